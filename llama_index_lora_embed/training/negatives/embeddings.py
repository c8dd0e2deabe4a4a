"""The vectors that mining ranks by: made once, kept on disk by fingerprint, handed to sentence-transformers' miner."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError, NonFiniteLossError, OutputDirectoryError
from llama_index_lora_embed.core.files import whole_file

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Vectors:
    """A model to sentence-transformers' miner that looks vectors up by id instead of encoding texts.

    So the corpus is encoded once for all slices, two nodes with one text stay two ids, and the miner's own cache,
    which knows a model by the name of its base alone, stays out of it.
    """

    device: torch.device
    questions: dict[str, Array]
    passage_ids: list[str]
    passages: Array

    def encode_query(self, query_ids: list[str], **_: Any) -> Array:
        """Of questions, [ids, dimension]."""
        return np.stack([self.questions[i] for i in query_ids])

    def encode_document(self, passage_ids: list[str], **_: Any) -> Array:
        """Of the whole corpus, [ids, dimension]."""
        assert passage_ids == self.passage_ids, "the miner is to search the whole corpus, in its order"
        return self.passages

    def similarity(self, questions: Any, passages: Any) -> torch.Tensor:
        """Cosine similarities [questions, passages]."""
        import torch

        return torch.as_tensor(questions, device=self.device) @ torch.as_tensor(passages, device=self.device).T

    def similarity_pairwise(self, questions: Any, passages: Any) -> torch.Tensor:
        """Cosine similarities [pairs], row by row."""
        import torch

        return (torch.as_tensor(questions) * torch.as_tensor(passages)).sum(dim=1)

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return int(self.passages.shape[1])


def vector_folder(cache_folder: Path, fingerprint: str | None) -> Path:
    """Where the vectors of the model with this fingerprint are kept."""
    # a name that leads elsewhere, or the same one for every model, would mix vectors up
    if not fingerprint or not re.fullmatch(r"[\w-]+", fingerprint):
        raise ConfigError(
            f"cache_folder={str(cache_folder)!r} with fingerprint={fingerprint!r}",
            "the mining model's fingerprint, letters and digits, because vectors are kept by it",
            "Pass fingerprint=llama_index_lora_embed.adapter.fingerprint(model, ...), or no cache_folder.",
        )
    return cache_folder / fingerprint


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    task: Literal["query", "document"],
    settings: MiningSettings,
    folder: Path | None,
) -> Array:
    """Unit vectors [texts, dimension], from the folder's file for these very texts or made anew."""
    file = None if folder is None else folder / f"{task}-{_digest(texts)}.npy"
    if file is not None and (kept := _read(file, len(texts))) is not None:
        return kept
    made_by = model.encode_query if task == "query" else model.encode_document
    shown = settings.show_progress_bar
    made = made_by(list(texts), batch_size=settings.batch_size, show_progress_bar=shown, normalize_embeddings=True)
    vectors = np.asarray(made, dtype=np.float32)
    if not_finite := np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
        raise NonFiniteLossError(
            f"{len(not_finite)} of {len(texts)} {task} vectors that are NaN or infinite, the first of "
            f"{texts[not_finite[0]]!r:.80}",
            "finite numbers",
            "Mine with another model, or load this one in float32.",
        )
    if file is not None:
        _write(file, vectors)
    return vectors


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _read(file: Path, count: int) -> Array | None:
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


def _write(file: Path, vectors: Array) -> None:
    """Write a cache file; a reader sees the whole of it or nothing."""
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
