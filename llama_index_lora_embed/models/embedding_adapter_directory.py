"""The directory of an embedding adapter: weights as safetensors, `finetune.json`, atomic writing, checked reading.

Directories of llama-index-embeddings-adapter (`config.json` and `pytorch_model.bin`) are read, too.
"""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llama_index_lora_embed.config import MANIFEST_NAME
from llama_index_lora_embed.core.errors import (
    AdapterError,
    ModelNotFoundError,
    UnsafeCheckpointError,
)
from llama_index_lora_embed.models.adapter_directory import (
    MAP_WEIGHTS_NAME,
    OLD_CONFIG,
    OLD_WEIGHTS,
    Manifest,
    check_digests,
    check_output,
    digests,
    is_old_embedding_adapter,
    write_manifest,
    written_directory,
)

_PREFIX = "adapter."
_PROBE = "probe"  # a vector beside the weights
_RESTORE = "Restore the directory from a copy, or train again."

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """The content of a directory.

    Attributes:
        place: The directory.
        kind: Recorded name of the adapter's class.
        arguments: What its class is made with.
        state: Its weights by name.
        manifest: None for a directory of llama-index-embeddings-adapter.
        probe: Vector of a known query by the embedding model that it was trained on; None if it was not recorded.
    """

    place: str
    kind: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    manifest: Manifest | None = None
    probe: FloatArray | None = None


def write_directory(
    path: str | os.PathLike[str], state: dict[str, Tensor], manifest: Manifest, probe: FloatArray | None
) -> None:
    """Write an adapter directory atomically; an adapter that is there is kept as `<name>.previous`.

    Args:
        path: The directory.
        state: Weights by name.
        manifest: Its `embedding_adapter` has kind and arguments; the digests of the files are added.
        probe: See `AdapterFiles`.

    Raises:
        OutputDirectoryError: The disk is full or not writable, or other files are there; the target is unchanged.
    """
    from safetensors.torch import save_file

    target = check_output(path, is_old_embedding_adapter)
    tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if probe is not None:
        tensors[_PROBE] = torch.from_numpy(probe)
    with written_directory(target) as staging:
        save_file(tensors, staging / MAP_WEIGHTS_NAME)
        write_manifest(replace(manifest, files=digests(staging)), staging)


def read_directory(path: str | os.PathLike[str]) -> AdapterFiles:
    """Read and check a directory of `write_directory` or of llama-index-embeddings-adapter.

    Raises:
        ModelNotFoundError: There is no such directory.
        AdapterError: It is damaged, or holds something else.
        UnsafeCheckpointError: It holds a pickle of more than tensors.
    """
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        raise ModelNotFoundError(
            f"embedding adapter {str(path)!r}, which is not there", "an adapter's directory", "Check the path."
        )
    if (directory / MANIFEST_NAME).exists():
        return _read(directory)
    if (directory / OLD_CONFIG).exists() and (directory / OLD_WEIGHTS).exists():
        return _read_old(directory)
    raise AdapterError(
        f"{str(directory)!r} without {MANIFEST_NAME}, and without {OLD_CONFIG} and {OLD_WEIGHTS}",
        "an embedding adapter of this package or of llama-index-embeddings-adapter",
        "Pass the model_output_path of EmbeddingAdapterFinetuneEngine.",
    )


def _read(directory: Path) -> AdapterFiles:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = Manifest.read(directory)
    assert manifest is not None
    facts = manifest.embedding_adapter
    if not facts:
        raise AdapterError(
            f"{str(directory)!r}, which holds a LoRA", "an embedding adapter", f"LoraEmbedding({str(directory)!r})"
        )
    check_digests(directory, manifest.files, _RESTORE)
    try:
        tensors = load_file(directory / MAP_WEIGHTS_NAME)
        kind, arguments = facts["kind"], facts["arguments"]
    except (SafetensorError, OSError, KeyError) as error:
        raise AdapterError(
            f"{str(directory)!r}, which cannot be read ({type(error).__name__}: {error})",
            "an embedding adapter of this package",
            _RESTORE,
        ) from error
    probe = tensors.pop(_PROBE, None)
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return AdapterFiles(str(directory), kind, arguments, state, manifest, None if probe is None else probe.numpy())


def _read_old(directory: Path) -> AdapterFiles:
    try:
        arguments = json.loads((directory / OLD_CONFIG).read_text(encoding="utf-8"))
        state = torch.load(directory / OLD_WEIGHTS, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{str(directory / OLD_WEIGHTS)!r}, a pickle of more than tensors ({str(error).splitlines()[0]})",
            "weights: any other pickle can run code when it is loaded",
            "Save the adapter again with a current llama-index-embeddings-adapter.",
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise AdapterError(f"{str(directory)!r}, which cannot be read ({error})", "an adapter", _RESTORE) from error
    kind = "two_layer" if "hidden_features" in arguments else "linear"
    return AdapterFiles(str(directory), kind, arguments, state)
