"""Opening whatever a folder or Hub id holds as an embedding model: adapter, embedding adapter, export or base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError, ModelNotFoundError
from llama_index_lora_embed.core.files import absolute
from llama_index_lora_embed.embedding.adapter_embedding import AdapterEmbeddingModel
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding


def open_embedding(
    place: str | os.PathLike[str], *, base_model: str | os.PathLike[str] | None = None, **settings: Any
) -> BaseEmbedding:
    """The embedding model in a folder or under a Hub id.

    Args:
        place: A LoRA adapter, an export, a base model, or an embedding adapter.
        base_model: The base of an adapter, if it has moved; the model below an embedding adapter, which is required.
        **settings: Of `LoraEmbedding`: `device`, `cache_folder`, `trust_remote_code`, ...

    Raises:
        ConfigError: An embedding adapter without its base, or a base for a model that needs none.
        LoraEmbedError: As `LoraEmbedding` and `AdapterEmbeddingModel`.
    """
    kind = _kind_of(absolute(place), settings.get("cache_folder"))
    if kind == "embedding adapter":
        if base_model is None:
            raise ConfigError(
                f"{str(place)!r}, an adapter on top of an embedding model",
                "the model below it",
                "Name it as base_model= (--base on the command line).",
            )
        return AdapterEmbeddingModel(open_embedding(base_model, **settings), place)
    if kind != "base":
        return LoraEmbedding(place, base_model=base_model, **settings)
    if base_model is not None:
        raise ConfigError(f"{str(place)!r}, which is no adapter, with a base model", "an adapter", "Leave one out.")
    return LoraEmbedding(base_model=place, **settings)


def open_lora_embedding(place: str | os.PathLike[str], **settings: Any) -> LoraEmbedding:
    """`open_embedding` of a model with weights of its own.

    Raises:
        ConfigError: It is an adapter on top of another embedding model.
        LoraEmbedError: As `LoraEmbedding`.
    """
    if _kind_of(absolute(place), settings.get("cache_folder")) == "embedding adapter":
        raise ConfigError(
            f"{str(place)!r}, an adapter on top of an embedding model", "a LoRA adapter or a base", "Name one."
        )
    found = open_embedding(place, **settings)
    assert isinstance(found, LoraEmbedding)
    return found


def open_base(adapter: str | os.PathLike[str], **settings: Any) -> BaseEmbedding:
    """The base that an adapter was trained on, as it is installed.

    Args:
        adapter: Folder or Hub id of a LoRA adapter.
        **settings: Of `LoraEmbedding`.

    Raises:
        ConfigError: It is no LoRA adapter.
        LoraEmbedError: As `LoraEmbedding`.
    """
    from llama_index_lora_embed.models.opened_adapter import open_adapter

    place, cache = absolute(adapter), settings.get("cache_folder")
    if (kind := _kind_of(place, cache)) != "adapter":
        raise ConfigError(
            f"{str(adapter)!r}, which is of the kind {kind!r}, and no model to compare with",
            "a LoRA adapter, which names its base, or the model to compare with",
            "Name it (--base on the command line).",
        )
    base = open_adapter(place, cache_folder=cache).base
    return LoraEmbedding(base_model=base.path if Path(base.path).is_dir() else base.model_id, **settings)


def _kind_of(place: str, cache_folder: str | None) -> str:
    from llama_index_lora_embed.embedding.exported import EXPORT_NAME
    from llama_index_lora_embed.models.adapter_directory import CONFIG_NAME, Manifest
    from llama_index_lora_embed.models.base_model import locate

    folder = Path(place)
    if folder.is_file():
        raise ModelNotFoundError(f"{place!r}, which is a file", "the folder or Hub id of a model", "Name its folder.")
    if not folder.is_dir():
        folder, _ = locate(place, None, cache_folder)
    if (folder / EXPORT_NAME).is_file():
        return "export"
    if (folder / CONFIG_NAME).is_file():
        return "adapter"
    manifest = Manifest.read(folder)
    return "embedding adapter" if manifest is not None and manifest.embedding_adapter else "base"
