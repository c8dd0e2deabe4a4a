"""Hard negatives from an index that exists: its own search finds the candidates, with the vectors that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.arrays import cosine, unit_norm
from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.questions.base import embed_text
from llama_index_lora_embed.data.readers.vector_search import StoredPassage, store_search
from llama_index_lora_embed.data.stored_vectors import FloatArray
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.negatives.mining import Candidates, Choice, MiningReport, choose, with_negatives

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_QUERIES = 1000  # whose candidates are in memory at a time


def mine_from_store(
    dataset: EmbeddingQAFinetuneDataset,
    embed_model: BaseEmbedding,
    store: Any,
    settings: MiningSettings | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, MiningReport]:
    """`mine_hard_negatives` in a vector store that holds the passages: only the queries are embedded.

    Candidates come from the store's own, usually approximate, search; their cosine similarities are computed from its
    vectors. Memory grows with the queries, not with the store. Passages that become negatives are added to the
    corpus. Which chunks of a document are neighbours is not known, because the store is not read: with
    `sibling_window` above 0 no passage of a positive's document is a negative. Copies are found among the candidates.

    Args:
        dataset: Training data, whose passages have the ids of the store's nodes; it is not changed.
        embed_model: The model that made the store's vectors (`deployment.verify_index` checks that).
        store: What `store_search` takes: Chroma or Qdrant.
        settings: Number of negatives, margins.

    Returns:
        A new dataset with `hard_negatives` and their passages, and the report.

    Raises:
        ConfigError: The store's search returns no vectors.
        DatasetError: The dataset has problems, or the store lacks passages that answer queries.
    """
    settings = settings or MiningSettings()
    if settings.sibling_window:
        settings = settings.replace(sibling_window=None)
    dataset.check("training dataset")
    search = store_search(store)
    curated = dataset.hard_negatives or {}
    wanted = {q: settings.num_negatives - len(curated.get(q, [])) for q in dataset.queries}
    pending = [query_id for query_id, number in wanted.items() if number > 0]
    positives = search.passages(sorted(dataset.answer_ids()))
    if missing := sorted(dataset.answer_ids() - positives.keys()):
        raise DatasetError(
            f"{len(missing)} passages that answer queries and are not in the store",
            "passages whose ids are those of the store's nodes",
            "Make the dataset from the nodes of the index, or take these out:",
            missing,
        )
    found: dict[str, Choice] = {}
    texts, sources = dict(dataset.corpus), dict(dataset.source_documents or {})
    for start in range(0, len(pending), _QUERIES):
        part = pending[start : start + _QUERIES]
        queries = _embed_queries(embed_model, [dataset.queries[query_id] for query_id in part])
        depth = settings.range_max + max(len(dataset.relevant_docs[query_id]) for query_id in part)
        nearest = dict(zip(part, search.nearest(queries, depth), strict=True))
        wider = _with_candidates(dataset, nearest)
        false_negatives = FalseNegatives(wider, settings.sibling_window, wider.near_duplicates())
        for query_id, vector in zip(part, queries, strict=True):
            candidates = _candidates(query_id, vector, nearest[query_id], positives, false_negatives)
            guard = false_negatives.guard(query_id)
            found[query_id] = choose(query_id, candidates, guard, wanted[query_id], settings)
            for passage_id, _ in found[query_id].negatives:
                texts.setdefault(passage_id, wider.corpus[passage_id])
                sources.setdefault(passage_id, wider.source_of(passage_id))
    whole = dataset.model_copy(
        update={"corpus": texts, "source_documents": sources if dataset.source_documents else None}
    )
    return with_negatives(whole, found, settings)


def _embed_queries(embed_model: BaseEmbedding, texts: list[str]) -> FloatArray:
    """Unit vectors of queries [texts, dimensions]; LlamaIndex itself has no method for many."""
    together = getattr(embed_model, "_get_query_embeddings", None)
    vectors = together(texts) if together else [embed_model.get_query_embedding(text) for text in texts]
    return unit_norm(np.asarray(vectors, dtype=np.float32))


def _with_candidates(
    dataset: EmbeddingQAFinetuneDataset, nearest: dict[str, list[StoredPassage]]
) -> EmbeddingQAFinetuneDataset:
    """The dataset over its own passages and what the store found."""
    corpus, sources = dict(dataset.corpus), dict(dataset.source_documents or {})
    for passages in nearest.values():
        for node, _ in passages:
            if node.node_id not in corpus:
                corpus[node.node_id] = embed_text(node)
                sources[node.node_id] = node.ref_doc_id or node.node_id
    return dataset.model_copy(update={"corpus": corpus, "source_documents": sources})


def _candidates(
    query_id: str,
    vector: FloatArray,
    nearest: list[StoredPassage],
    positives: dict[str, StoredPassage],
    false_negatives: FalseNegatives,
) -> Candidates:
    corpus = false_negatives.corpus
    relevant = corpus.dataset.relevant_docs[query_id]
    own = {corpus.first[i] for i in relevant}
    scores = {
        corpus.first[node.node_id]: cosine(vector, stored)
        for node, stored in nearest
        if corpus.first[node.node_id] not in own
    }
    lowest, at = min((cosine(vector, positives[i].vector), i) for i in relevant)
    return Candidates(at, lowest, sorted(scores.items(), key=lambda item: -item[1]))
