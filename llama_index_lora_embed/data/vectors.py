"""The vectors that mining ranks by: made once, kept on disk by fingerprint, handed to sentence-transformers' miner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.data.vector_files import Array, read_vectors, texts_digest, write_vectors
from llama_index_lora_embed.errors import ConfigError, NonFiniteLossError

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer


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
    file = None if folder is None else folder / f"{task}-{texts_digest(texts)}.npy"
    if file is not None and (kept := read_vectors(file, len(texts))) is not None:
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
        write_vectors(file, vectors)
    return vectors
