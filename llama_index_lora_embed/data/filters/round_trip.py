"""The round trip: which queries find their passage again, by its embedding or by its words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from numpy.typing import NDArray

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.core.errors import NonFiniteLossError, warn_user
from llama_index_lora_embed.data.bm25 import BM25
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset

_TEXTS_AT_ONCE = 1024
_QUERIES_AT_ONCE = 64  # scores of these and all passages are in memory at once


@dataclass(frozen=True)
class RoundTrip:
    """What a round trip found.

    Attributes:
        lost: Queries that do not find their passage again.
        hard: Queries whose passage only BM25 finds.
        notes: Warnings that were issued.
    """

    lost: list[str] = field(default_factory=list)
    hard: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def round_trip(
    dataset: EmbeddingQAFinetuneDataset,
    query_ids: list[str],
    k: int,
    settings: QueryFilterSettings,
    embed_model: BaseEmbedding | Callable[[], BaseEmbedding],
) -> RoundTrip:
    """Search the corpus for each query; a query is lost if none of its passages is among the first k.

    Promptagator (arXiv 2209.11755) trains a retriever on the synthetic queries and keeps those for which it ranks the
    passage first. With a base that was not trained on them, that would drop what it has yet to learn. Therefore BM25
    searches as well: its errors have other causes, so that a pair which both miss is likely to be wrong.

    Args:
        dataset: Queries and corpus.
        query_ids: Queries to check; each has a passage in the corpus.
        k: Depth of both searches.
        settings: `round_trip_keep_hard` and `round_trip_max_dropped`.
        embed_model: The embedding model, or a function that makes it.

    Raises:
        NonFiniteLossError: `embed_model` returns NaN or infinity.
    """
    if not query_ids:
        return RoundTrip()
    # isinstance, not callable(): LlamaIndex's embedding models can be called, too
    model = embed_model if isinstance(embed_model, BaseEmbedding) else embed_model()
    ranks = _ranks(dataset, query_ids, model)
    missed = [i for i, rank in zip(query_ids, ranks, strict=True) if rank >= k]
    hard = _found_by_words(dataset, missed, k) if missed and settings.round_trip_keep_hard else []
    lost = [i for i in missed if i not in set(hard)]
    if len(lost) <= settings.round_trip_max_dropped * len(query_ids):
        return RoundTrip(lost, hard)
    note = (
        f"The round trip was not applied: it would have dropped {len(lost)} of {len(query_ids)} queries "
        f"({len(lost) / len(query_ids):.0%}, more than {settings.round_trip_max_dropped:.0%}), which says more about "
        "the embedding model than about the queries."
    )
    warn_user(note)
    return RoundTrip(notes=[note])


def _ranks(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], model: BaseEmbedding) -> list[int]:
    """Number of passages that are nearer to each query than its nearest relevant passage."""
    rows = {i: row for row, i in enumerate(dataset.corpus)}
    vectors = _embedded(list(dataset.corpus.values()), model.get_text_embedding_batch)
    ranks = []
    for start in range(0, len(query_ids), _QUERIES_AT_ONCE):
        some = query_ids[start : start + _QUERIES_AT_ONCE]
        queries = _embedded([dataset.queries[i] for i in some], lambda t: [model.get_query_embedding(x) for x in t])
        for query_id, scores in zip(some, queries @ vectors.T, strict=True):
            best = scores[_relevant_rows(dataset, query_id, rows)].max()
            # an equal text must not count as nearer because of a rounding error
            ranks.append(int((scores > best + np.float32(1e-6)).sum()))
    return ranks


def _found_by_words(dataset: EmbeddingQAFinetuneDataset, query_ids: list[str], k: int) -> list[str]:
    """The queries that share words with one of their passages, and with fewer than k others more or rarer ones."""
    rows = {i: row for row, i in enumerate(dataset.corpus)}
    bm25 = BM25(dataset.corpus.values())
    found = []
    for query_id in query_ids:
        scores = bm25.scores(dataset.queries[query_id])
        best = scores[_relevant_rows(dataset, query_id, rows)].max()
        if best > 0 and (scores > best).sum() < k:
            found.append(query_id)
    return found


def _relevant_rows(dataset: EmbeddingQAFinetuneDataset, query_id: str, rows: dict[str, int]) -> list[int]:
    return [rows[i] for i in dataset.relevant_docs[query_id] if i in rows]


def _embedded(texts: list[str], embed: Callable[[list[str]], Any]) -> NDArray[np.float32]:
    """Unit vectors [texts, dimensions], in chunks because lists of floats take eight times the memory."""
    pieces = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        piece = np.asarray(embed(texts[start : start + _TEXTS_AT_ONCE]), dtype=np.float32)
        if not np.isfinite(piece).all():
            raise NonFiniteLossError(
                "embeddings with NaN or infinity from the embed_model of the round trip",
                "finite numbers",
                "Pass another embed_model, or round_trip_k=None.",
            )
        pieces.append(unit_norm(piece))
    return np.concatenate(pieces)
