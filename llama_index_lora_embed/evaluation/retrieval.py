"""Retrieval measures of an embedding model on a dataset, query by query."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, NonFiniteLossError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset, normalise
from llama_index_lora_embed.evaluation.embeddings import Embedder
from llama_index_lora_embed.evaluation.metrics import DEPTH, measure
from llama_index_lora_embed.evaluation.search import FloatArray, nearest

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_ON_THE_MAP = 150  # queries whose vectors are kept; more would be a blot on a picture
_PASSAGES_OF_ONE = 2  # of a query's, on the picture
_SHOWN = 3

Encode = Callable[[list[str]], FloatArray]


@dataclass(frozen=True, eq=False)
class VectorSample:
    """Vectors of some queries and their relevant passages, for a picture.

    Attributes:
        query_ids: Names of the rows of `queries`.
        passage_ids: Names of the rows of `passages`: what is relevant to these queries, two of each at most.
        queries: [query_ids, dimensions], of length 1.
        passages: [passage_ids, dimensions], of length 1.
        relevant: Of each query, which of the passages are.
    """

    query_ids: list[str]
    passage_ids: list[str]
    relevant: list[list[str]]
    queries: FloatArray = field(repr=False)
    passages: FloatArray = field(repr=False)


@dataclass(frozen=True, eq=False)
class RetrievalEvaluation:
    """Measures of one model, or of one retriever, on one dataset.

    Attributes:
        metrics: Mean over the queries of each of `measures.NAMES`, from 0 to 1; see `measures.measure`.
        per_query: Query id to its own measures.
        rankings: Query id to the ids of the hundred best passages, best first.
        origins: How many of the queries were made in which way.
        passages: Size of the corpus that was searched.
        similarities: Query id to the scores of its ranking; a retriever may give none.
        relevant_similarities: Query id to the cosine of each of its relevant passages, wherever they were ranked.
        sample: Some vectors; None of a retriever.
        query_origins: Query id to how it was made, where the dataset says so.
        digest: Of queries, corpus and judgments, so that only evaluations of the same ones are compared; empty if it is
            not known.
        notes: What there is to know of dataset and answers beside the measures, a sentence each.
    """

    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]] = field(repr=False)
    rankings: dict[str, list[str]] = field(repr=False)
    origins: dict[str, int]
    passages: int
    similarities: dict[str, list[float]] = field(default_factory=dict, repr=False)
    relevant_similarities: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    sample: VectorSample | None = field(default=None, repr=False)
    notes: list[str] = field(default_factory=list)
    query_origins: dict[str, str] = field(default_factory=dict, repr=False)
    digest: str = field(default="", repr=False)

    def scores(self, measure: str) -> list[float]:
        """A measure of each query, in the order of the dataset."""
        return [values[measure] for values in self.per_query.values()]


def evaluate_retrieval(
    embed_model: BaseEmbedding,
    dataset: EmbeddingQAFinetuneDataset,
    *,
    num_workers: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> RetrievalEvaluation:
    """Evaluate any LlamaIndex embedding model on a dataset, by exact search with cosine similarity.

    Memory is that of the vectors, of a block of scores (16 MB) and of a hundred places for each query.

    Args:
        embed_model: Its query and text sides are both used.
        dataset: Questions, corpus and judgments; grades, where it has some, count in nDCG.
        num_workers: For models behind an API: how many requests are under way at once, by their asynchronous methods.
            None embeds with the synchronous ones.
        cache_folder: Where vectors are kept by model, side and text, 1,024 texts at a time, so that an API is paid
            once; None keeps none. A model is known by its fingerprint; one without by its settings (keys left out),
            the files of its folder, and the vectors that it makes of a probe, which is embedded each time.
        show_progress: Show a bar.

    Returns:
        Measures that agree with sentence-transformers' InformationRetrievalEvaluator, where it has them, and with
        trec_eval.

    Raises:
        ConfigError: The vectors differ in length, or num_workers is no positive number.
        DatasetError: The dataset is empty or has dangling ids.
        NonFiniteLossError: Vectors are NaN or infinite; the texts are named.
        OutputDirectoryError: cache_folder cannot be written.

    Example:
        >>> evaluate_retrieval(embed_model, val).metrics["ndcg@10"]  # doctest: +SKIP
        0.748
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    maker = Embedder(embed_model, num_workers=num_workers, cache_folder=cache_folder, show_progress=show_progress)
    return _judge(*run_async(_vectors_of_both(maker, dataset), suspends=num_workers is not None), dataset)


async def aevaluate_retrieval(
    embed_model: BaseEmbedding,
    dataset: EmbeddingQAFinetuneDataset,
    *,
    num_workers: int = 4,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> RetrievalEvaluation:
    """`evaluate_retrieval` in the running event loop, by the model's asynchronous methods.

    Results and errors are the same. The search runs in a thread, so that the loop stays free.
    """
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    maker = Embedder(embed_model, num_workers=num_workers, cache_folder=cache_folder, show_progress=show_progress)
    return await asyncio.to_thread(_judge, *await _vectors_of_both(maker, dataset), dataset)


async def _vectors_of_both(maker: Embedder, dataset: EmbeddingQAFinetuneDataset) -> tuple[FloatArray, FloatArray]:
    """Of queries in the order of the dataset, and of passages in that of their ids."""
    queries = await maker.vectors(list(dataset.queries.values()), "query")
    return queries, await maker.vectors([dataset.corpus[i] for i in sorted(dataset.corpus)], "passage")


def evaluate_encoders(
    encode_queries: Encode, encode_passages: Encode, dataset: EmbeddingQAFinetuneDataset
) -> RetrievalEvaluation:
    """Evaluate two functions from texts to vectors.

    Args:
        encode_queries: n texts to a float array [n, dimensions] of their own, which is scaled in place.
        encode_passages: The same for passages.
        dataset: Questions, corpus and judgments.

    Raises:
        ConfigError: Vectors of queries and passages differ in length, or there are not as many as texts.
        DatasetError: The dataset is empty or has dangling ids.
        NonFiniteLossError: Vectors are NaN or infinite.
    """
    dataset.check("evaluation dataset")
    queries = encode_queries(list(dataset.queries.values()))
    return _judge(queries, encode_passages([dataset.corpus[i] for i in sorted(dataset.corpus)]), dataset)


def _judge(queries: FloatArray, passages: FloatArray, dataset: EmbeddingQAFinetuneDataset) -> RetrievalEvaluation:
    query_ids = list(dataset.queries)
    passage_ids = sorted(dataset.corpus)  # equal scores are ranked by id, as sentence-transformers does
    queries, passages = unit_vectors(queries, query_ids, "query"), unit_vectors(passages, passage_ids, "passage")
    if queries.shape[1] != passages.shape[1]:
        raise ConfigError(
            f"query vectors of {queries.shape[1]} and passage vectors of {passages.shape[1]} dimensions",
            "as many of both",
            "Take one model for queries and passages.",
        )
    rows, scores = nearest(queries, passages, DEPTH)
    rankings = {q: [passage_ids[row] for row in found] for q, found in zip(query_ids, rows, strict=True)}
    per_query = measure(rankings, relevance(dataset))
    place = {passage_id: row for row, passage_id in enumerate(passage_ids)}
    return RetrievalEvaluation(
        means(per_query),
        per_query,
        rankings,
        dataset.origins(),
        len(passage_ids),
        similarities={q: found.tolist() for q, found in zip(query_ids, scores, strict=True)},
        relevant_similarities={
            q: {i: float(vector @ passages[place[i]]) for i in dataset.relevant_docs[q]}
            for q, vector in zip(query_ids, queries, strict=True)
        },
        sample=_sample(dataset, queries, passages, place),
        notes=[*notes_on(dataset), *_notes_on_vectors(queries, passages)],
        query_origins=dict(dataset.query_origins or {}),
        digest=judged_digest(dataset),
    )


def judged_digest(dataset: EmbeddingQAFinetuneDataset) -> str:
    """SHA-256 (hex) of queries, corpus and judgments, whatever else a dataset holds."""
    held = [dataset.queries, dataset.corpus, relevance(dataset)]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def relevance(dataset: EmbeddingQAFinetuneDataset) -> dict[str, dict[str, float]]:
    """Query id to the grades of its relevant passages, above 0 and at most 1."""
    return {q: {i: dataset.score(q, i) for i in dataset.relevant_docs[q]} for q in dataset.queries}


def means(per_query: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean of each measure over the queries."""
    first = next(iter(per_query.values()))
    return {name: float(np.mean([values[name] for values in per_query.values()])) for name in first}


def notes_on(dataset: EmbeddingQAFinetuneDataset) -> list[str]:
    """What makes a dataset's measures lower or higher than retrieval is, a sentence each."""
    seen: dict[str, str] = {}
    twins = [i for i, text in dataset.corpus.items() if seen.setdefault(normalise(text), i) != i]
    asked: dict[str, str] = {}
    again = [i for i, text in dataset.queries.items() if asked.setdefault(normalise(text), i) != i]
    notes = []
    if twins:
        notes.append(
            f"{len(twins)} of {len(dataset.corpus)} passages have the text of another ({_some(twins)}): where only one "
            "of them is judged relevant, finding the other counts as wrong."
        )
    if again:
        notes.append(f"{len(again)} of {len(dataset.queries)} queries have the wording of another ({_some(again)}).")
    return notes


def unit_vectors(vectors: Any, ids: Sequence[str], what: str) -> FloatArray:
    """Vectors of length 1; those that are zero stay so. An array of float32 is scaled in place, where it can be.

    Args:
        vectors: [ids, dimensions].
        ids: Names of the rows, for the message.
        what: What they are of, for the message.

    Raises:
        ConfigError: There are not as many as ids.
        NonFiniteLossError: Some are NaN or infinite.
    """
    array: FloatArray = np.require(vectors, np.float32, ["W"])
    if array.ndim != 2 or len(array) != len(ids):
        raise ConfigError(
            f"{what} vectors of the shape {array.shape}", f"one for each of {len(ids)} texts", "Look at the encoder."
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1)).tolist()
    if bad:
        raise NonFiniteLossError(
            f"{len(bad)} of {len(array)} {what} vectors with NaN or infinity in them ({_some([ids[i] for i in bad])})",
            "numbers",
            "Of a model in training: lower the learning_rate. Of another: load it in float32.",
        )
    array /= np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
    return array


def _notes_on_vectors(queries: FloatArray, passages: FloatArray) -> list[str]:
    nothing = {what: int((~vectors.any(axis=1)).sum()) for what, vectors in (("query", queries), ("passage", passages))}
    return [
        f"{count} {what} vector(s) are zero, as near to one text as to any other."
        for what, count in nothing.items()
        if count
    ]


def _sample(
    dataset: EmbeddingQAFinetuneDataset, queries: FloatArray, passages: FloatArray, place: dict[str, int]
) -> VectorSample:
    """Of queries at even distances, so that the same ones are drawn for every model."""
    query_ids = list(dataset.queries)
    chosen = np.unique(np.linspace(0, len(query_ids) - 1, min(_ON_THE_MAP, len(query_ids))).astype(int)).tolist()
    relevant = [list(dict.fromkeys(dataset.relevant_docs[query_ids[row]]))[:_PASSAGES_OF_ONE] for row in chosen]
    passage_ids = list(dict.fromkeys(i for ids in relevant for i in ids))
    return VectorSample(
        [query_ids[row] for row in chosen],
        passage_ids,
        relevant,
        queries[chosen],
        passages[[place[i] for i in passage_ids]],
    )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(repr(i) for i in ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
