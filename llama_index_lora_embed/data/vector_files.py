"""Vectors on disk: whole or not there, and looked at before they are believed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama_index_lora_embed.data.files import whole_file
from llama_index_lora_embed.errors import OutputDirectoryError

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]


def texts_digest(texts: Sequence[str]) -> str:
    """SHA-256 (hex) of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_vectors(file: Path, count: int) -> Array | None:
    """The vectors of a cache file; None if it is missing or damaged."""
    try:
        vectors: Array = np.load(file, allow_pickle=False)
        if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
            raise ValueError(f"not {count} finite float32 vectors")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("cached vectors in %s are damaged and made anew: %s", file, error)
        return None
    return vectors


def write_vectors(file: Path, vectors: Array) -> None:
    """Write a cache file; a reader sees the whole of it or nothing.

    Raises:
        OutputDirectoryError: It cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file, "wb") as stream:
            np.save(stream, vectors)
    except OSError as error:
        raise OutputDirectoryError(
            f"a cache folder {str(file.parent)!r} that cannot be written ({error})",
            "a folder with room for the vectors",
            "Pass another cache_folder, or none.",
        ) from error
