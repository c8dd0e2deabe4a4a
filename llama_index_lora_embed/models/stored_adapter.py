"""An embedding adapter that was read from a directory, and its map of vectors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llama_index_lora_embed.core.errors import AdapterError
from llama_index_lora_embed.models.adapter_directory import Manifest
from llama_index_lora_embed.models.embedding_adapter import (
    KINDS,
    BaseAdapter,
    LinearLayer,
    LowRankLayer,
    adapter_digest,
    made_of,
)
from llama_index_lora_embed.models.embedding_adapter_directory import FloatArray, read_directory

_TINY = np.float32(1e-12)


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """An adapter with what its directory records.

    Attributes:
        adapter: With its weights, on the CPU.
        manifest: None for a directory of llama-index-embeddings-adapter.
        probe: Vector of a known query by the embedding model that it was trained on; None if it was not recorded.
    """

    adapter: BaseAdapter
    manifest: Manifest | None
    probe: FloatArray | None = None

    @property
    def is_identity(self) -> bool:
        """Whether training gained nothing, so that vectors stay as they are."""
        return self.manifest is not None and bool(self.manifest.embedding_adapter.get("identity"))

    def digest(self) -> str:
        """SHA-256 (hex) of what it does to a vector."""
        return "" if self.is_identity else f"{adapter_digest(self.adapter)}{'' if self.manifest else ':raw'}"

    def function(self, device: str = "cpu") -> Callable[[npt.ArrayLike], FloatArray]:
        """The map of vectors [..., dimensions] to such vectors, in numpy where it is linear.

        The adapter sees vectors of length 1, and the result has the length of the vector that was given, so that scores
        keep their scale. Those of llama-index-embeddings-adapter see and return vectors as they are.
        """
        if self.is_identity:
            return lambda vectors: np.asarray(vectors, np.float32)
        mapped = _plain_function(self.adapter, device)
        if self.manifest is None:
            return lambda vectors: mapped(np.asarray(vectors, np.float32))
        is_linear = isinstance(self.adapter, LowRankLayer) or (
            isinstance(self.adapter, LinearLayer) and not self.adapter.bias
        )

        def scaled(vectors: npt.ArrayLike) -> FloatArray:
            given = np.asarray(vectors, np.float32)
            length = _length(given)
            result = mapped(given if is_linear else np.divide(given, np.maximum(length, _TINY), dtype=np.float32))
            result *= length / np.maximum(_length(result), _TINY)
            return result

        return scaled


def _length(vectors: FloatArray) -> FloatArray:
    """Lengths [..., 1]; faster for one vector than numpy.linalg.norm."""
    lengths: FloatArray = np.sqrt(np.einsum("...i,...i->...", vectors, vectors))
    return lengths[..., None]


def _plain_function(adapter: BaseAdapter, device: str) -> Callable[[FloatArray], FloatArray]:
    if type(adapter) is LinearLayer:
        weight = np.ascontiguousarray(adapter.linear.weight.detach().numpy().T)
        bias = adapter.linear.bias.detach().numpy() if adapter.bias else np.float32(0)
        return lambda vectors: vectors @ weight + bias
    if type(adapter) is LowRankLayer:
        down, up = (np.ascontiguousarray(t.detach().numpy().T) for t in (adapter.down, adapter.up))
        return lambda vectors: vectors + vectors @ down @ up
    moved = adapter.to(device).eval()

    def compute(vectors: FloatArray) -> FloatArray:
        with torch.inference_mode():
            mapped: FloatArray = moved(torch.from_numpy(vectors).to(device)).float().cpu().numpy()
        return mapped

    return compute


def read_adapter(path: str | os.PathLike[str], adapter_cls: type[Any] | None = None) -> StoredAdapter:
    """Read an adapter directory.

    Args:
        path: A directory of this package or of llama-index-embeddings-adapter.
        adapter_cls: Class of the adapter; None for the one of this package that is recorded.

    Raises:
        ModelNotFoundError: There is no such directory.
        AdapterError: It is damaged, or holds an adapter of another class.
        UnsafeCheckpointError: It holds a pickle of more than tensors.
    """
    found = read_directory(path)
    adapter_cls = adapter_cls or KINDS.get(found.kind)
    if adapter_cls is None:
        raise AdapterError(
            f"{str(path)!r} with an adapter of the class {found.kind}",
            "that class, which is not looked up by its name, because importing it runs code",
            f"Pass adapter_cls={found.kind.rpartition('.')[2]}.",
        )
    return StoredAdapter(made_of(found, adapter_cls), found.manifest, found.probe)
