"""Activations for the backward pass, kept in half of their size, and how many bytes they take.

Steps in float32 keep what their backward pass needs in bfloat16, and do not keep the output of a GELU, which is
computed again from its input: 56 instead of 147 KB per token of MiniLM, so that fewer forward passes must be computed
twice (`training.efficiency.gradcache`). Values of forward passes do not change; a gradient's cosine with the exact one
is above 0.9999. Switch: `ObjectiveSettings(mini_batch_size=None)`, which computes the batch whole and keeps everything
as it is. Delete this module when memory for all activations is no concern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

_LEAST = 1 << 16  # numbers; smaller tensors, of which there are few bytes, are kept in float32
_BLOCK = 1 << 25  # bytes; the C library gives a block of this size back to the system
_ALIGNED = 64
_Place = tuple[int, int]  # address and version


@dataclass
class _Kept:
    """A tensor's whole storage in the memory of `Activations`, or what computes it from there."""

    stored: Tensor
    compute: Callable[[Tensor], Tensor] | None = None

    def whole(self) -> Tensor:
        flat = self.stored.float()
        return flat if self.compute is None else self.compute(flat)


class _Memory:
    """Blocks of memory for tensors that are dropped together.

    Between the large tensors that a pass allocates and frees, those that stay would leave holes, by which a process
    grew to twice what it held.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._used: list[int] = []

    def clear(self) -> None:
        """Drop all tensors; the memory is used again."""
        self._used = [0] * len(self._blocks)

    def free(self) -> None:
        """Give the memory back to the system; nothing of it may be in use."""
        self._blocks, self._used = [], []

    def store(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a flat tensor in a dtype."""
        size = flat.numel() * dtype.itemsize
        step = -(-size // _ALIGNED) * _ALIGNED
        number = next((i for i, used in enumerate(self._used) if used + step <= len(self._blocks[i])), len(self._used))
        if number == len(self._used):
            self._blocks.append(torch.empty(max(step, _BLOCK), dtype=torch.uint8))
            self._used.append(0)
        start = self._used[number]
        self._used[number] += step
        return self._blocks[number][start : start + size].view(dtype).copy_(flat)


class Activations:
    """Keeps what forward passes of a model need for their backward passes.

    Attributes:
        bytes: Those that are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._memory = _Memory()
        self._gelus = [m for m in model.modules() if type(m) is GELUActivation and m.act is nn.functional.gelu]
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._shapes = {parameter.shape for parameter in model.parameters()}  # of weights that were cast
        # the last tensor that was kept, by its place: a layer's input is needed by each of its three projections
        self._last: tuple[_Place, Tensor, _Kept] | None = None
        self._last_gelu: tuple[_Place, Tensor] | None = None

    def clear(self) -> None:
        """Drop what is kept, when all backward passes have been computed."""
        self.bytes = 0
        self._memory.clear()

    def free(self) -> None:
        """Drop what is kept, and its memory."""
        self.bytes = 0
        self._memory.free()

    @contextmanager
    def halved(self) -> Iterator[None]:
        """Within it, large float32 tensors on a CPU are kept in bfloat16, and outputs of GELUs not at all."""
        changed = [gelu for gelu in self._gelus if "forward" not in gelu.__dict__]
        for gelu in changed:
            gelu.__dict__["forward"] = self._gelu
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            for gelu in changed:
                del gelu.__dict__["forward"]
            self._last = self._last_gelu = None

    def _gelu(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(x)  # keeps x
        known = self._last is not None and self._last[0] == _place(x)
        self._last_gelu = (_place(y), y.detach()) if known else None
        return y

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or storage.data_ptr() in self._weights:
            return tensor
        whole = tensor.dtype == torch.float32 and storage.nbytes() == tensor.nbytes and _is_dense(tensor)
        if not whole:
            self.bytes += 0 if tensor.shape in self._shapes else min(tensor.nbytes, storage.nbytes())
            return tensor
        return self._keep(tensor), tensor.shape, tensor.stride()

    def _keep(self, tensor: Tensor) -> _Kept:
        place = _place(tensor)
        if self._last is not None and self._last[0] == place:
            return self._last[2]
        gelu, self._last_gelu = self._last_gelu, None
        if gelu is not None and gelu[0] == place and self._last is not None:  # the last that was kept is its input
            return _Kept(self._last[2].stored, nn.functional.gelu)
        dtype = torch.float32 if tensor.numel() < _LEAST else torch.bfloat16
        kept = _Kept(self._memory.store(torch.as_strided(tensor.detach(), (tensor.numel(),), (1,), 0), dtype))
        self.bytes += kept.stored.nbytes
        if dtype == torch.bfloat16:  # small ones come between
            self._last = (place, tensor.detach(), kept)  # held, because its address stands for it
        return kept

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        kept, shape, stride = packed
        whole: Tensor = torch.as_strided(kept.whole(), shape, stride)
        return whole


def _place(tensor: Tensor) -> _Place:
    """What stands for the values of a tensor's storage while it is held."""
    return tensor.untyped_storage().data_ptr(), tensor._version


def _is_dense(tensor: Tensor) -> bool:
    """Whether each number of the storage is one of the tensor's."""
    expected = 1
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(pair for pair in dimensions if pair[1] > 1):
        if stride != expected:
            return False
        expected *= size
    return True
