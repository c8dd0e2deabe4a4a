"""The passages to be judged for each query: the best ones of every model and of BM25, put together (pooling)."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.bm25 import BM25
from llama_index_lora_embed.data.build import check_arguments, passages_of
from llama_index_lora_embed.data.llm.identity import digest
from llama_index_lora_embed.data.readers.query_logs import read_queries
from llama_index_lora_embed.data.text import normalise
from llama_index_lora_embed.evaluation.embeddings import Embedder, unit_vectors
from llama_index_lora_embed.evaluation.judging.grades import HIGHEST
from llama_index_lora_embed.evaluation.search import nearest

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import BaseNode

logger = logging.getLogger(__name__)
_BM25_NAME = "BM25"


@dataclass(frozen=True)
class Pool:
    """Queries with the passages to be judged for each of them.

    Attributes:
        queries: Query id to text.
        corpus: Passage id to text: all nodes with text, as indexing embeds them.
        sources: Passage id to the id of its source document.
        passages: Query id to the ids of its pooled passages; of passages with the same text, the first one.
        copies: Text of a passage to the ids of all passages that have it.
        retrievers: Names of what the passages are from.
        distinct: Number of queries before `max_queries` of them were chosen.
        skipped: Queries and nodes left out, by reason.
    """

    queries: dict[str, str]
    corpus: dict[str, str]
    sources: dict[str, str]
    passages: dict[str, list[str]]
    copies: dict[str, list[str]]
    retrievers: tuple[str, ...]
    distinct: int
    skipped: dict[str, int]


def make_pool(
    queries: Any,
    nodes: Sequence[BaseNode],
    models: Mapping[str, BaseEmbedding] | Sequence[BaseEmbedding],
    *,
    top_k: int,
    threshold: int,
    max_queries: int | None,
    seed: int,
    column: str | None,
    num_workers: int | None,
    cache_folder: str | os.PathLike[str] | None,
    show_progress: bool,
) -> Pool:
    """Read the queries, choose some of them, and search the nodes with every model and with BM25.

    BM25 adds only passages that share a word with the query. The arguments and errors are those of `judge_queries`.
    """
    if not isinstance(models, (Mapping, list, tuple)):
        raise ConfigError(f"models of type {type(models).__name__}", "a list, or a mapping of names", "[base, tuned]")
    named = models if isinstance(models, Mapping) else {f"model {n}": model for n, model in enumerate(models, 1)}
    embedders = {name: Embedder(model, num_workers, cache_folder, show_progress) for name, model in named.items()}
    problems = [
        f"{name}={value!r}: expected {expected}"
        for name, value, fits, expected in (
            ("models", models, bool(embedders), "at least one embedding model, best the base and the tuned one"),
            ("top_k", top_k, is_int(top_k, 1), "a number above 0"),
            ("threshold", threshold, is_int(threshold, 1) and threshold <= HIGHEST, f"1 to {HIGHEST}"),
            ("max_queries", max_queries, max_queries is None or is_int(max_queries, 1), "None or a number above 0"),
        )
        if not fits
    ]
    if problems:
        raise ConfigError(f"{len(problems)} unusable argument(s)", "other values", "Correct them:", problems)
    check_arguments(nodes, [], None)
    skipped: Counter[str] = Counter()
    chosen, distinct = _choose(queries, column, max_queries, seed, skipped)
    corpus, sources, _ = passages_of(nodes, skipped)
    copies: dict[str, list[str]] = {}
    for passage_id in sorted(corpus):  # so that of tied passages those are judged that an evaluation ranks first
        copies.setdefault(corpus[passage_id], []).append(passage_id)

    pooled: dict[str, dict[str, None]] = {query_id: {} for query_id in chosen}
    ids, texts = [group[0] for group in copies.values()], list(copies)
    for embedder in embedders.values():
        suspends = num_workers is not None
        query_vectors = run_async(embedder.embed(list(chosen.values()), "query"), suspends=suspends)
        vectors = run_async(embedder.embed(texts, "passage"), suspends=suspends)
        best, _ = nearest(
            unit_vectors(query_vectors, list(chosen), "query"), unit_vectors(vectors, ids, "passage"), top_k
        )
        for found, rows in zip(pooled.values(), best, strict=True):
            found.update((ids[row], None) for row in rows)
    bm25 = BM25(texts)
    for query_id, found in pooled.items():
        scores = bm25.scores(chosen[query_id])
        rows = np.argsort(-scores, kind="stable")[:top_k]
        found.update((ids[row], None) for row in rows if scores[row] > 0)
    passages = {query_id: list(found) for query_id, found in pooled.items()}
    return Pool(chosen, corpus, sources, passages, copies, (*named, _BM25_NAME), distinct, dict(skipped))


def _choose(
    queries: Any, column: str | None, max_queries: int | None, seed: int, skipped: Counter[str]
) -> tuple[dict[str, str], int]:
    """The queries to be judged by id, and the number of different ones that they were chosen from."""
    read, report = read_queries(queries, column)
    skipped.update({"query that is empty or cannot be read": sum(report.skipped.values())})
    distinct: dict[str, tuple[str, str]] = {}  # by wording
    for given, text in read:
        wording = normalise(text)
        if wording in distinct:
            skipped["query with another one's wording"] += 1
        else:
            distinct[wording] = (given or digest(wording)[:16], text)
    if not distinct:
        raise DatasetError(
            f"{report.rows} queries, none of them with text",
            "queries as users typed them",
            'Pass a list of texts, or a log and the name of its column, as in column="query".',
            report.places,
        )
    uses = Counter(query_id for query_id, _ in distinct.values())
    if repeated := [f"{i!r}: {text!r:.60}" for i, text in distinct.values() if uses[i] > 1]:
        raise DatasetError(
            f"{len(repeated)} queries that share their ids",
            "an id of its own for each query; 1 and '1' are the same id",
            "Rename them, or pass a list of texts:",
            repeated,
        )
    order = list(distinct)
    random.Random(seed).shuffle(order)  # fewer queries of the same log and seed are some of these
    kept = set(order[:max_queries])
    if len(kept) < len(order):
        logger.warning("%d of %d queries were sampled (max_queries)", len(kept), len(order))
    return dict(query for wording, query in distinct.items() if wording in kept), len(distinct)
