"""Recordings of CUDA graphs in tests: noting them, and making them on a processor.

There operations are noted while recording, and computed again into the same memory.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_index_lora_embed.models.kernels import cuda_graphs


class Graph:
    """Like `torch.cuda.CUDAGraph`: `replay` computes what was recorded, from what its inputs' memory holds then."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, outputs in self.operations:
                again = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)]
                for old, new in zip(outputs, again, strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


class _Note(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.graph.operations.append((function, args, kwargs or {}, outputs))
        return result


@contextmanager
def record(graph: Graph, **options: Any) -> Any:
    own = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True  # transformers asks
    try:
        with _Note(graph):
            yield
    finally:
        torch.cuda.is_current_stream_capturing = own


def emulated() -> SimpleNamespace:
    """Stands in for `torch.cuda`."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    return SimpleNamespace(
        CUDAGraph=Graph,
        graph=record,
        graph_pool_handle=object,
        Stream=lambda device: stream,
        current_stream=lambda: stream,
        stream=lambda stream: nullcontext(),
        set_stream=lambda stream: None,
        empty_cache=lambda: None,
        memory_allocated=lambda: 0,
        mem_get_info=lambda: (1 << 30, 1 << 30),
    )


def noted(monkeypatch: Any) -> list[Any]:
    """The list of recordings that are made from now on."""
    made: list[Any] = []
    original = cuda_graphs._Recording.__init__

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(cuda_graphs._Recording, "__init__", noting)
    return made
