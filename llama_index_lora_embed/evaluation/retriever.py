"""Evaluate a LlamaIndex retriever as it runs in production."""

from __future__ import annotations

from functools import partial
from typing import Any

from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.evaluation.embeddings import check_num_workers, gather_limited
from llama_index_lora_embed.evaluation.metrics import DEPTH, compute_metrics
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluation_of, relevance

_TOP_K = 10  # the depth of all metrics but map@100


def evaluate_index(
    retriever: Any, dataset: EmbeddingQAFinetuneDataset, *, num_workers: int | None = None
) -> RetrievalEvaluation:
    """Run every query of a dataset through a retriever, and evaluate the retrieved nodes by their ids.

    This covers approximate search, filters, reranking and `similarity_top_k`. In addition to the metrics of
    `evaluate_retrieval` there are hit_rate and mrr over all retrieved nodes, as LlamaIndex's `RetrieverEvaluator`
    defines them. map@100 is left out if the retriever returns fewer nodes. `notes` of the result report queries without
    results, repeated nodes (the first one counts) and nodes that are not in the dataset (they count as wrong).

    Args:
        retriever: `index.as_retriever(similarity_top_k=10)`, or an index, which is searched with this retriever.
        dataset: Queries and judgments; its passage ids are the ids of the nodes.
        num_workers: Number of concurrent queries, by `aretrieve`; None calls `retrieve`.

    Raises:
        ConfigError: retriever is neither a retriever nor an index, or num_workers is not a positive number.
        DatasetError: The dataset is empty or has dangling ids, or none of the retrieved nodes is in it.

    Example:
        >>> evaluate_index(index.as_retriever(similarity_top_k=10), val).metrics["hit_rate"]  # doctest: +SKIP
        0.86
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    check_num_workers(num_workers)
    chosen = _as_retriever(retriever, "retrieve" if num_workers is None else "aretrieve")
    texts = list(dataset.queries.values())
    if num_workers is None:
        results = [chosen.retrieve(text) for text in texts]
    else:
        results = run_async(gather_limited([partial(chosen.aretrieve, text) for text in texts], num_workers))
    retrieved = dict(zip(dataset.queries, results, strict=True))
    scores: dict[str, dict[str, Any]] = {query_id: {} for query_id in dataset.queries}
    for query_id, nodes in retrieved.items():
        for node in nodes or ():
            scores[query_id].setdefault(node.node_id, node.score)  # of repeated nodes the first one counts
    repeated = [query_id for query_id, nodes in retrieved.items() if len(scores[query_id]) < len(nodes or ())]
    rankings = {query_id: list(found) for query_id, found in scores.items()}
    longest = max(map(len, rankings.values()))
    notes = _notes(dataset, rankings, repeated, longest)
    per_query = compute_metrics(rankings, relevance(dataset))
    for query_id, ranking in rankings.items():
        if longest < min(DEPTH, len(dataset.corpus)):  # it would not be comparable with that of a complete ranking
            del per_query[query_id]["map@100"]
        relevant = set(dataset.relevant_docs[query_id])
        first = next((rank for rank, i in enumerate(ranking, 1) if i in relevant), None)
        per_query[query_id] |= {"hit_rate": float(first is not None), "mrr": 1 / first if first else 0.0}
    return evaluation_of(
        dataset,
        per_query,
        {q: ranking[:DEPTH] for q, ranking in rankings.items()},
        {q: list(found.values())[:DEPTH] for q, found in scores.items() if None not in found.values()},
        notes,
    )


def _as_retriever(given: Any, method: str) -> Any:
    from llama_index.core.base.base_query_engine import BaseQueryEngine
    from llama_index.core.indices.base import BaseIndex

    if isinstance(given, BaseIndex):
        return given.as_retriever(similarity_top_k=_TOP_K)
    if not callable(getattr(given, method, None)) or isinstance(given, BaseQueryEngine):
        raise ConfigError(
            f"a retriever of type {type(given).__name__}",
            f"an object with {method}(query), or an index",
            "Pass index.as_retriever(similarity_top_k=10); for a query engine, query_engine.retriever.",
        )
    return given


def _notes(
    dataset: EmbeddingQAFinetuneDataset, rankings: dict[str, list[str]], repeated: list[str], longest: int
) -> list[str]:
    """Peculiarities of the results; a DatasetError if none of the nodes is in the dataset."""
    returned = {i for ranking in rankings.values() for i in ranking}
    unknown = sorted(returned - dataset.corpus.keys())
    if returned and len(unknown) == len(returned):
        raise DatasetError(
            f"{len(returned)} nodes from the retriever, none of which is in the dataset (e.g. {unknown[0]!r})",
            f"nodes with the ids of the dataset (e.g. {next(iter(dataset.corpus))!r})",
            "Build dataset and index from the same nodes; most readers give nodes new ids each time.",
        )
    notes = []
    if empty := [query_id for query_id, ranking in rankings.items() if not ranking]:
        notes.append(f"{len(empty)} of {len(rankings)} queries retrieved nothing (e.g. {empty[0]!r}).")
    if repeated:
        notes.append(
            f"{len(repeated)} of {len(rankings)} queries retrieved a node more than once (e.g. {repeated[0]!r}); its "
            "first rank counts."
        )
    if unknown:
        notes.append(
            f"{len(unknown)} of {len(returned)} retrieved nodes are not in the dataset (e.g. {unknown[0]!r}): they "
            "count as wrong."
        )
    if longest < min(_TOP_K, len(dataset.corpus)):
        notes.append(f"No query retrieved more than {longest} nodes, so metrics @10 are metrics @{longest}.")
    return notes
