"""Embed a file of texts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError
from llama_index_lora_embed.core.files import whole_file
from llama_index_lora_embed.evaluation.embeddings import Embedder
from llama_index_lora_embed.evaluation.search import FloatArray

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding


def embed_texts(
    embed_model: BaseEmbedding, texts: Sequence[str], *, queries: bool = False, show_progress: bool = False
) -> FloatArray:
    """Vectors of texts, float32 [texts, dimensions]: of passages, or of queries.

    Raises:
        ConfigError: A text is none.
    """
    embedder = Embedder(embed_model, None, None, show_progress)
    return run_async(embedder.embed(list(texts), "query" if queries else "passage"), suspends=False)


def write_vectors(path: str | os.PathLike[str], texts: Sequence[str], vectors: FloatArray) -> Path:
    """Write vectors as numpy's `.npy`, or with their texts as the lines of a `.jsonl` file.

    Raises:
        ConfigError: The file has another ending.
        OutputDirectoryError: It cannot be written.
    """
    target = Path(path).expanduser().absolute()
    if target.suffix not in (".npy", ".jsonl"):
        raise ConfigError(f"a file named {target.name!r}", "one that ends in .npy or .jsonl", "Rename it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target, "wb") as file:
            if target.suffix == ".npy":
                np.save(file, vectors)
            else:
                file.writelines(f"{line}\n".encode() for line in as_json_lines(texts, vectors))
    except OSError as error:
        raise OutputDirectoryError(
            f"{str(target)!r}, which cannot be written ({error})", "a writable file", "Choose another path."
        ) from error
    return target


def as_json_lines(texts: Sequence[str], vectors: FloatArray) -> Iterator[str]:
    """A JSON object for each text: {"text": ..., "embedding": [...]}."""
    for text, vector in zip(texts, vectors.tolist(), strict=True):
        yield json.dumps({"text": text, "embedding": vector})
