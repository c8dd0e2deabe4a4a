"""Retrieval measures of an embedding model on a dataset, query by query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.errors import NonFiniteLossError

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_DEPTH = 10  # no measure here looks further down the ranking
_CHUNK = 256  # queries scored at a time; bounds the memory at 256 x passages floats

FloatArray = NDArray[np.float32]
Encode = Callable[[list[str]], FloatArray]


@dataclass(frozen=True)
class RetrievalEvaluation:
    """Measures of one model on one dataset.

    Attributes:
        metrics: Mean over the queries of hit@1, hit@5, mrr@10, ndcg@10 and recall@10, each from 0 to 1.
        per_query: Query id to its own measures.
        rankings: Query id to the ids of the ten best passages, best first.
        origins: How many of the queries were made in which way.
        passages: Size of the corpus that was searched.
    """

    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]] = field(repr=False)
    rankings: dict[str, list[str]] = field(repr=False)
    origins: dict[str, int]
    passages: int

    def scores(self, measure: str) -> list[float]:
        """A measure of each query, in the order of the dataset."""
        return [values[measure] for values in self.per_query.values()]


def evaluate_retrieval(
    embed_model: BaseEmbedding, dataset: EmbeddingQAFinetuneDataset, *, show_progress: bool = False
) -> RetrievalEvaluation:
    """Evaluate any LlamaIndex embedding model on a dataset, by exact search with cosine similarity.

    Args:
        embed_model: Its query and text sides are both used.
        dataset: Questions, corpus and judgments.
        show_progress: Show LlamaIndex's bar while the corpus is embedded.

    Returns:
        Measures that agree with sentence-transformers' InformationRetrievalEvaluator.

    Raises:
        DatasetError: The dataset is empty or has dangling ids.
    """

    def passages(texts: list[str]) -> FloatArray:
        return np.asarray(embed_model.get_text_embedding_batch(texts, show_progress=show_progress), dtype=np.float32)

    def queries(texts: list[str]) -> FloatArray:
        return np.asarray([embed_model.get_query_embedding(text) for text in texts], dtype=np.float32)

    return evaluate_encoders(queries, passages, EmbeddingQAFinetuneDataset.coerce(dataset))


def evaluate_encoders(
    encode_queries: Encode, encode_passages: Encode, dataset: EmbeddingQAFinetuneDataset
) -> RetrievalEvaluation:
    """Evaluate two functions from texts to vectors.

    Args:
        encode_queries: n texts to a float array [n, dimensions].
        encode_passages: The same for passages.
        dataset: Questions, corpus and judgments.

    Raises:
        DatasetError: The dataset is empty or has dangling ids.
        NonFiniteLossError: Vectors are NaN or infinite.
    """
    dataset.check("evaluation dataset")
    query_ids = list(dataset.queries)
    passage_ids = sorted(dataset.corpus)  # equal scores are ranked by id, as sentence-transformers does
    query_vectors = _unit(encode_queries([dataset.queries[i] for i in query_ids]))
    passage_vectors = _unit(encode_passages([dataset.corpus[i] for i in passage_ids]))
    rankings = rank(query_vectors, passage_vectors, query_ids, passage_ids)
    per_query = {i: query_metrics(rankings[i], set(dataset.relevant_docs[i])) for i in query_ids}
    names = per_query[query_ids[0]]
    metrics = {name: float(np.mean([values[name] for values in per_query.values()])) for name in names}
    return RetrievalEvaluation(metrics, per_query, rankings, dataset.origins(), len(passage_ids))


def rank(
    query_vectors: FloatArray,
    passage_vectors: FloatArray,
    query_ids: Sequence[str],
    passage_ids: Sequence[str],
) -> dict[str, list[str]]:
    """The ten passages nearest to each query, best first; ties in the order of `passage_ids`.

    Args:
        query_vectors: [queries, dimensions].
        passage_vectors: [passages, dimensions].
        query_ids: Names of the rows.
        passage_ids: Names of the rows.
    """
    found: dict[str, list[str]] = {}
    for start in range(0, len(query_ids), _CHUNK):
        scores = query_vectors[start : start + _CHUNK] @ passage_vectors.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :_DEPTH]
        for query_id, row in zip(query_ids[start : start + _CHUNK], order, strict=True):
            found[query_id] = [passage_ids[i] for i in row]
    return found


def query_metrics(ranking: Sequence[str], relevant: set[str]) -> dict[str, float]:
    """Measures of one ranking under binary relevance.

    hit@k: one relevant passage or more among the first k. mrr@10: 1 / rank of the first relevant one, 0 beyond
    10. ndcg@10: Järvelin and Kekäläinen (2002) with gain 1 and discount log2(rank + 1). recall@10: share of the
    relevant passages among the first 10.
    """
    hits = [passage_id in relevant for passage_id in ranking[:_DEPTH]]
    first = hits.index(True) + 1 if True in hits else None
    gain = sum(1 / np.log2(position + 2) for position, hit in enumerate(hits) if hit)
    ideal = sum(1 / np.log2(position + 2) for position in range(min(len(relevant), _DEPTH)))
    return {
        "hit@1": float(any(hits[:1])),
        "hit@5": float(any(hits[:5])),
        "mrr@10": 1 / first if first else 0.0,
        "ndcg@10": float(gain / ideal),
        "recall@10": sum(hits) / len(relevant),
    }


def _unit(vectors: Any) -> FloatArray:
    array = np.asarray(vectors, dtype=np.float32)
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array).all(axis=1)).sum())
        raise NonFiniteLossError(
            f"{bad} of {len(array)} vectors with NaN or infinity in them", "numbers", "Lower the learning_rate."
        )
    return np.asarray(array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12), dtype=np.float32)
