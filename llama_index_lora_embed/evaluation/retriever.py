"""A LlamaIndex retriever judged as it runs in production."""

from __future__ import annotations

from functools import partial
from typing import Any

from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.evaluation.embeddings import checked_workers, in_turns
from llama_index_lora_embed.evaluation.metrics import DEPTH, measure
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, judged_digest, means, relevance

_AT = 10  # what the deepest measures but map@100 look at


def evaluate_index(
    retriever: Any, dataset: EmbeddingQAFinetuneDataset, *, num_workers: int | None = None
) -> RetrievalEvaluation:
    """Ask a retriever every query of a dataset, as a user would, and judge the nodes that come back by their ids.

    Whatever the retriever is made of counts: approximate search, filters, reranking, `similarity_top_k`. Beside the
    measures of `evaluate_retrieval` there are hit_rate and mrr over all that it returned, as LlamaIndex's
    `RetrieverEvaluator` has them; map@100 is there only if the retriever returns as many.

    Args:
        retriever: `index.as_retriever(similarity_top_k=10)`, or an index, whose retriever with `similarity_top_k=10`
            is taken.
        dataset: Questions and judgments; its passage ids are the nodes' ids.
        num_workers: Queries under way at once, by the retriever's asynchronous method; None asks one after the other
            with the synchronous one.

    Returns:
        The evaluation; `notes` tells of queries that got nothing, of nodes that came twice (the first one counts) and
        of nodes that the dataset does not know (they count as wrong).

    Raises:
        ConfigError: It is no retriever, or num_workers is no positive number.
        DatasetError: The dataset is empty or has dangling ids, or none of the nodes that came back is in it.

    Example:
        >>> evaluate_index(index.as_retriever(similarity_top_k=10), val).metrics["hit_rate"]  # doctest: +SKIP
        0.86
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    num_workers = checked_workers(num_workers)
    asked = _retriever(retriever, "retrieve" if num_workers is None else "aretrieve")
    texts = list(dataset.queries.values())
    answers = (
        [asked.retrieve(text) for text in texts]
        if num_workers is None
        else run_async(in_turns([partial(asked.aretrieve, text) for text in texts], num_workers))
    )
    found = {
        q: [(node.node_id, node.score) for node in nodes or ()]
        for q, nodes in zip(dataset.queries, answers, strict=True)
    }
    ranked = {q: dict(reversed(nodes)) for q, nodes in found.items()}  # the first of several counts
    rankings = {q: list(dict.fromkeys(i for i, _ in nodes)) for q, nodes in found.items()}
    notes = _notes(dataset, {q: [i for i, _ in nodes] for q, nodes in found.items()})
    per_query = measure(rankings, relevance(dataset))
    most = max(map(len, rankings.values()))
    for query_id, ranking in rankings.items():
        if most < min(DEPTH, len(dataset.corpus)):  # it would be another measure than that of a whole ranking
            del per_query[query_id]["map@100"]
        relevant = set(dataset.relevant_docs[query_id])
        first = next((rank for rank, i in enumerate(ranking, 1) if i in relevant), None)
        per_query[query_id] |= {"hit_rate": float(first is not None), "mrr": 1 / first if first else 0.0}
    return RetrievalEvaluation(
        means(per_query),
        per_query,
        {q: ranking[:DEPTH] for q, ranking in rankings.items()},
        dataset.origins(),
        len(dataset.corpus),
        similarities={
            q: [ranked[q][i] for i in ranking[:DEPTH]]
            for q, ranking in rankings.items()
            if all(ranked[q][i] is not None for i in ranking)
        },
        notes=notes,
        query_origins=dict(dataset.query_origins or {}),
        digest=judged_digest(dataset),
    )


def _retriever(given: Any, method: str) -> Any:
    from llama_index.core.base.base_query_engine import BaseQueryEngine
    from llama_index.core.indices.base import BaseIndex

    if isinstance(given, BaseIndex):
        return given.as_retriever(similarity_top_k=_AT)
    if not callable(getattr(given, method, None)) or isinstance(given, BaseQueryEngine):
        raise ConfigError(
            f"a retriever of type {type(given).__name__}",
            f"something with {method}(query), or an index",
            "index.as_retriever(similarity_top_k=10); a query engine's is query_engine.retriever",
        )
    return given


def _notes(dataset: EmbeddingQAFinetuneDataset, found: dict[str, list[str]]) -> list[str]:
    """What is odd about the answers.

    Raises:
        DatasetError: No node is known.
    """
    returned = {i for nodes in found.values() for i in nodes}
    unknown = sorted(returned - dataset.corpus.keys())
    if returned and len(unknown) == len(returned):
        raise DatasetError(
            f"{len(returned)} nodes from the retriever, none of which is in the dataset (e.g. {unknown[0]!r})",
            f"nodes with ids as the dataset has them (e.g. {next(iter(dataset.corpus))!r})",
            "Build dataset and index from the same nodes; most readers give nodes new ids each time.",
        )
    notes = []
    empty = [q for q, nodes in found.items() if not nodes]
    if empty:
        notes.append(f"{len(empty)} of {len(found)} queries got no answer at all (e.g. {empty[0]!r}).")
    twice = [q for q, nodes in found.items() if len(set(nodes)) < len(nodes)]
    if twice:
        notes.append(f"{len(twice)} queries got a node more than once (e.g. {twice[0]!r}); the first place counts.")
    if unknown:
        notes.append(f"{len(unknown)} nodes are not in the dataset (e.g. {unknown[0]!r}) and count as wrong.")
    most = max((len(nodes) for nodes in found.values()), default=0)
    if most < min(_AT, len(dataset.corpus)):
        notes.append(f"No query got more than {most} nodes, so that measures @10 are measures @{most}.")
    return notes
