"""Retrieval metrics of an embedding model on a dataset, overall and for each query."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.text import normalise
from llama_index_lora_embed.evaluation.embeddings import Embedder, examples, unit_vectors
from llama_index_lora_embed.evaluation.metrics import DEPTH, compute_metrics, metric_label
from llama_index_lora_embed.evaluation.search import FloatArray, nearest

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_SAMPLE_QUERIES = 150  # queries whose vectors are kept; a scatter plot of more is hard to read
_SAMPLE_PASSAGES = 2  # passages of each of them

Encode = Callable[[list[str]], FloatArray]


@dataclass(frozen=True, eq=False)
class EmbeddingSample:
    """Vectors of some queries and of at most two relevant passages of each of them, for a plot.

    Attributes:
        queries: Unit vectors, [queries, dimensions].
        passages: Unit vectors, [passages, dimensions].
        links: (row of the query, row of the passage) of each relevant passage.
    """

    queries: FloatArray = field(repr=False)
    passages: FloatArray = field(repr=False)
    links: list[tuple[int, int]] = field(repr=False)


@dataclass(frozen=True, eq=False)
class RetrievalEvaluation:
    """Metrics of one model, or of one retriever, on one dataset.

    Attributes:
        metrics: Mean over the queries of each of `metrics.NAMES`, and of `metrics.JUDGED_NAMES` where the dataset has
            passages that were judged irrelevant, from 0 to 1; see `compute_metrics`.
        per_query: Query id to its metrics.
        rankings: Query id to the ids of the 100 best passages, best first.
        origins: Number of queries by origin.
        passages: Size of the corpus.
        similarities: Query id to the scores of its ranking; a retriever may give none.
        relevant_similarities: Query id to the cosine similarity of each of its relevant passages, whatever their rank.
        sample: Some vectors; None for a retriever.
        notes: Peculiarities of the dataset and of the results that affect the metrics, a sentence each.
        query_origins: Query id to origin, where the dataset records it.
        digest: Digest of queries, corpus and judgments, by which comparisons check that they are the same; empty if not
            known.
    """

    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]] = field(repr=False)
    rankings: dict[str, list[str]] = field(repr=False)
    origins: dict[str, int]
    passages: int
    similarities: dict[str, list[float]] = field(default_factory=dict, repr=False)
    relevant_similarities: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    sample: EmbeddingSample | None = field(default=None, repr=False)
    notes: list[str] = field(default_factory=list)
    query_origins: dict[str, str] = field(default_factory=dict, repr=False)
    digest: str = field(default="", repr=False)

    def scores(self, metric: str) -> list[float]:
        """The metric of each query, in the order of the dataset."""
        return [values[metric] for values in self.per_query.values()]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {origin}" for origin, count in self.origins.items())
        head = f"{len(self.per_query)} queries ({kinds}) over {self.passages} passages"
        metrics = [f"{metric_label(name):18}{value:6.3f}" for name, value in self.metrics.items()]
        return "\n".join([head, *metrics, *self.notes])


def evaluate_retrieval(
    embed_model: BaseEmbedding,
    dataset: EmbeddingQAFinetuneDataset,
    *,
    num_workers: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> RetrievalEvaluation:
    """Evaluate any LlamaIndex embedding model on a dataset, by exact search with cosine similarity.

    Memory holds the vectors, a block of scores (16 MB) and 100 ranks for each query. The metrics agree with trec_eval
    and, where it has them, with sentence-transformers' InformationRetrievalEvaluator.

    Args:
        embed_model: The model; queries and passages are embedded by its respective methods.
        dataset: Queries, corpus and judgments. Grades, if there are any, count in nDCG.
        num_workers: For models behind an API: number of concurrent requests, by the asynchronous methods. None uses the
            synchronous methods.
        cache_folder: Folder in which vectors are cached by model, side and text, 1,024 texts at a time, so that an API
            is paid once. A model is identified by its fingerprint, or else by its settings (except secrets), the files
            of its folder, and its vector of a probe, which is embedded each time.
        show_progress: Show a progress bar.

    Raises:
        ConfigError: The vectors differ in length, or num_workers is not a positive number.
        DatasetError: The dataset is empty or has dangling ids.
        NonFiniteLossError: Vectors are NaN or infinite; the texts are named.
        OutputDirectoryError: cache_folder cannot be written.

    Example:
        >>> evaluate_retrieval(embed_model, val).metrics["ndcg@10"]  # doctest: +SKIP
        0.748
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    embedder = Embedder(embed_model, num_workers, cache_folder, show_progress)
    return _evaluate(*run_async(_embed(embedder, dataset), suspends=num_workers is not None), dataset)


async def aevaluate_retrieval(
    embed_model: BaseEmbedding,
    dataset: EmbeddingQAFinetuneDataset,
    *,
    num_workers: int = 4,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> RetrievalEvaluation:
    """`evaluate_retrieval` in the running event loop, by the asynchronous methods of the model.

    Results and errors are the same. The search runs in a thread, so that it does not block the loop.
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    embedder = Embedder(embed_model, num_workers, cache_folder, show_progress)
    return await asyncio.to_thread(_evaluate, *await _embed(embedder, dataset), dataset)


def evaluate_encoders(
    encode_queries: Encode, encode_passages: Encode, dataset: EmbeddingQAFinetuneDataset
) -> RetrievalEvaluation:
    """Evaluate two functions from n texts to a float array [n, dimensions], which is scaled in place.

    Passages that do not fit into memory are a file: `lambda texts: np.load(path, mmap_mode="r")` of float32 vectors of
    length 1, in the order of the sorted passage ids.

    Raises:
        ConfigError: Vectors of queries and passages differ in length, or their number is not that of the texts.
        DatasetError: The dataset is empty or has dangling ids.
        NonFiniteLossError: Vectors are NaN or infinite.
    """
    dataset.check("evaluation dataset")
    queries, passages = _texts(dataset)
    return _evaluate(encode_queries(queries), encode_passages(passages), dataset)


def evaluation_of(
    dataset: EmbeddingQAFinetuneDataset,
    per_query: dict[str, dict[str, float]],
    rankings: dict[str, list[str]],
    similarities: dict[str, list[float]],
    notes: list[str],
) -> RetrievalEvaluation:
    """A `RetrievalEvaluation` with its means, and with what it records of the dataset."""
    names = next(iter(per_query.values()))
    metrics = {name: float(np.mean([values[name] for values in per_query.values()])) for name in names}
    if metrics.get("judged@10", 1) < 1:
        unjudged = f"{1 - metrics['judged@10']:.1%} of the first 10 passages of all rankings are unjudged"
        notes = [*notes, f"{unjudged}: they count as wrong, except in bpref and condensed nDCG@10."]
    return RetrievalEvaluation(
        metrics,
        per_query,
        rankings,
        dataset.origins(),
        len(dataset.corpus),
        similarities,
        notes=notes,
        query_origins=dict(dataset.query_origins or {}),
        digest=evaluation_digest(dataset),
    )


def evaluation_digest(dataset: EmbeddingQAFinetuneDataset) -> str:
    """SHA-256 (hex) of queries, corpus and judgments, which decide the metrics."""
    content = [dataset.queries, dataset.corpus, relevance(dataset)]
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode(content):  # at once, it would be a copy of the corpus
        digest.update(piece.encode())
    return digest.hexdigest()


def relevance(dataset: EmbeddingQAFinetuneDataset) -> dict[str, dict[str, float]]:
    """Query id to the grades of its judged passages: 0 if irrelevant, above 0 and at most 1 if relevant."""
    irrelevant = dataset.judged_irrelevant or {}
    return {
        q: {i: dataset.score(q, i) for i in dataset.relevant_docs[q]} | dict.fromkeys(irrelevant.get(q, ()), 0.0)
        for q in dataset.queries
    }


def _texts(dataset: EmbeddingQAFinetuneDataset) -> tuple[list[str], list[str]]:
    """Queries in the order of the dataset, and passages in the order of their ids."""
    return list(dataset.queries.values()), [dataset.corpus[i] for i in sorted(dataset.corpus)]


async def _embed(embedder: Embedder, dataset: EmbeddingQAFinetuneDataset) -> tuple[FloatArray, FloatArray]:
    queries, passages = _texts(dataset)
    return await embedder.embed(queries, "query"), await embedder.embed(passages, "passage")


def _evaluate(queries: FloatArray, passages: FloatArray, dataset: EmbeddingQAFinetuneDataset) -> RetrievalEvaluation:
    query_ids = list(dataset.queries)
    passage_ids = sorted(dataset.corpus)  # ties are ranked by id, as sentence-transformers does
    queries, passages = unit_vectors(queries, query_ids, "query"), unit_vectors(passages, passage_ids, "passage")
    rows, scores = nearest(queries, passages, DEPTH)
    rankings = {q: [passage_ids[row] for row in ranked] for q, ranked in zip(query_ids, rows, strict=True)}
    row_of = {passage_id: row for row, passage_id in enumerate(passage_ids)}
    evaluation = evaluation_of(
        dataset,
        compute_metrics(rankings, relevance(dataset)),
        rankings,
        {q: values.tolist() for q, values in zip(query_ids, scores, strict=True)},
        _notes(dataset, queries, passages),
    )
    return replace(
        evaluation,
        relevant_similarities={
            q: {i: float(vector @ passages[row_of[i]]) for i in dataset.relevant_docs[q]}
            for q, vector in zip(query_ids, queries, strict=True)
        },
        sample=_sample(dataset, queries, passages, row_of),
    )


def _notes(dataset: EmbeddingQAFinetuneDataset, queries: FloatArray, passages: FloatArray) -> list[str]:
    notes = []
    consequence = ": where only one of them is judged relevant, retrieving the other counts as wrong."
    for name, texts, end in (("passages", dataset.corpus, consequence), ("queries", dataset.queries, ".")):
        first: dict[str, str] = {}
        if copies := [i for i, text in texts.items() if first.setdefault(normalise(text), i) != i]:
            count = f"{len(copies)} of {len(texts)} {name}"
            notes.append(f"{count} have the same text as another one ({examples(copies)}){end}")
    for name, vectors in (("query", queries), ("passage", passages)):
        if zeros := int((~vectors.any(axis=1)).sum()):
            notes.append(f"{zeros} of {len(vectors)} {name} vectors are zero, so their similarity to every text is 0.")
    return notes


def _sample(
    dataset: EmbeddingQAFinetuneDataset, queries: FloatArray, passages: FloatArray, row_of: dict[str, int]
) -> EmbeddingSample:
    """Vectors of evenly spaced queries, so that the sample is the same for every model."""
    query_ids = list(dataset.queries)
    rows = np.unique(np.linspace(0, len(query_ids) - 1, min(_SAMPLE_QUERIES, len(query_ids))).astype(int)).tolist()
    places: dict[int, int] = {}  # row of `passages` to row of the sample
    links = []
    for place, row in enumerate(rows):
        for passage_id in list(dict.fromkeys(dataset.relevant_docs[query_ids[row]]))[:_SAMPLE_PASSAGES]:
            links.append((place, places.setdefault(row_of[passage_id], len(places))))
    return EmbeddingSample(queries[rows], passages[list(places)], links)
