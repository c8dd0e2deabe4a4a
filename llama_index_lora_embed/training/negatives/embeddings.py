"""Embeddings that mining ranks by, computed once and given to sentence-transformers' miner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import NonFiniteLossError

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PrecomputedEmbeddings:
    """Looks like a model to sentence-transformers' miner, but "encodes" ids by looking up their embeddings.

    So the corpus is encoded once for all slices of queries, two nodes with the same text stay two ids, and the miner's
    own cache, which knows a model by the name of its base alone, is not used.
    """

    device: torch.device
    queries: dict[str, Array]
    passage_ids: list[str]
    passages: Array

    def encode_query(self, query_ids: list[str], **_: Any) -> Array:
        """Embeddings of queries, [ids, dimension]."""
        return np.stack([self.queries[i] for i in query_ids])

    def encode_document(self, passage_ids: list[str], **_: Any) -> Array:
        """Embeddings of the whole corpus, [ids, dimension]."""
        assert passage_ids == self.passage_ids, "the miner must search the whole corpus in its order"
        return self.passages

    def similarity(self, queries: Any, passages: Any) -> torch.Tensor:
        """Cosine similarities [queries, passages]."""
        import torch

        return torch.as_tensor(queries, device=self.device) @ torch.as_tensor(passages, device=self.device).T

    def similarity_pairwise(self, queries: Any, passages: Any) -> torch.Tensor:
        """Cosine similarities [pairs], row by row."""
        import torch

        return (torch.as_tensor(queries) * torch.as_tensor(passages)).sum(dim=1)

    def get_embedding_dimension(self) -> int:
        """Dimension of the embeddings."""
        return int(self.passages.shape[1])


def encode(
    model: SentenceTransformer, texts: Sequence[str], task: Literal["query", "document"], settings: MiningSettings
) -> Array:
    """Unit embeddings [texts, dimension].

    Raises:
        NonFiniteLossError: Some embeddings are NaN or infinite.
    """
    encode_task = model.encode_query if task == "query" else model.encode_document
    encoded = encode_task(
        list(texts),
        batch_size=settings.batch_size,
        show_progress_bar=settings.show_progress_bar,
        normalize_embeddings=True,
    )
    embeddings = np.asarray(encoded, dtype=np.float32)
    if not_finite := np.flatnonzero(~np.isfinite(embeddings).all(axis=1)).tolist():
        raise NonFiniteLossError(
            f"{len(not_finite)} of {len(texts)} {task} embeddings that are NaN or infinite, the first of "
            f"{texts[not_finite[0]]!r:.80}",
            "finite numbers",
            "Mine with another model, or load this one in float32.",
        )
    return embeddings
