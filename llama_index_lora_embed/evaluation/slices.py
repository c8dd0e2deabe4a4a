"""Slices of a dataset: groups of queries that are evaluated separately, because a mean can hide a loss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset

_MAX_KEYWORDS = 40  # characters up to which a query that is not a question counts as keywords
_MAX_SOURCES = 10  # documents with the most queries; the others form one slice
_QUESTION = re.compile(
    r"[?？؟]\s*$|^\s*(?:who|what|when|where|which|whose|whom|why|how|is|are|was|were|do|does|did|can|could|should|will)\b",
    re.IGNORECASE,
)

Slice = tuple[str, str, list[str]]


def make_slices(
    dataset: EmbeddingQAFinetuneDataset, model: Any, custom: Mapping[str, Sequence[str]] | None = None
) -> list[Slice]:
    """Slices by query length, query style, origin, source document, and truncation of the relevant passages.

    A criterion by which all queries are in one slice is left out. Only a `LoraEmbedding` tells which passages it
    truncates.

    Returns:
        (criterion, name, query ids) of each slice, those of `custom` (name to query ids) last; none of them is empty.

    Raises:
        DatasetError: A custom slice is empty or has unknown queries.
    """
    wrong, own = [], {}
    for name, given in (custom or {}).items():
        ids = own[name] = [given] if isinstance(given, str) else list(dict.fromkeys(given))
        unknown = [i for i in ids if i not in dataset.queries]
        if not ids:
            wrong.append(f"slice {name!r} has no queries")
        elif unknown:
            wrong.append(f"slice {name!r} names queries that are not in the dataset (e.g. {unknown[0]!r})")
    if wrong:
        raise DatasetError(
            f"{len(wrong)} of {len(own)} slices that are wrong", "ids of queries in the dataset", "Correct them:", wrong
        )
    criteria = [(by, parts) for by, parts in _criteria(dataset, model) if len(parts) > 1]
    return [(by, name, ids) for by, parts in [*criteria, ("custom", own)] for name, ids in parts.items()]


def _criteria(dataset: EmbeddingQAFinetuneDataset, model: Any) -> Iterator[tuple[str, dict[str, list[str]]]]:
    # not by words, which some scripts do not separate
    characters = {i: len(text.strip()) for i, text in dataset.queries.items()}
    low, high = (int(np.quantile(list(characters.values()), q)) for q in (1 / 3, 2 / 3))
    names = (f"up to {low} characters", f"up to {high} characters", f"more than {high} characters")
    lengths = {i: names[0 if n <= low else 1 if n <= high else 2] for i, n in characters.items()}
    yield "length", _grouped(lengths, list(dict.fromkeys(names)))
    styles = {
        i: "question" if _QUESTION.search(text) else "keywords" if characters[i] <= _MAX_KEYWORDS else "statement"
        for i, text in dataset.queries.items()
    }
    yield "style", _grouped(styles, ("question", "keywords", "statement"))
    origins = {i: dataset.origin_of(i) for i in dataset.queries}
    yield "origin", _grouped(origins, sorted(set(origins.values())))
    if dataset.source_documents:
        yield "source", _by_source(dataset)
    if hasattr(model, "is_cut"):
        ids = sorted(dataset.answer_ids())
        truncated = {i for i, cut in zip(ids, model.is_cut([dataset.corpus[i] for i in ids]), strict=True) if cut}
        kinds = ("complete passage", "truncated passage")
        passages = {i: kinds[any(p in truncated for p in dataset.relevant_docs[i])] for i in dataset.queries}
        yield "truncation", _grouped(passages, kinds)


def _grouped(names: Mapping[str, str], order: Sequence[str]) -> dict[str, list[str]]:
    """Query ids by name, from query id to name."""
    parts: dict[str, list[str]] = {name: [] for name in order}
    for query_id, name in names.items():
        parts[name].append(query_id)
    return {name: ids for name, ids in parts.items() if ids}


def _by_source(dataset: EmbeddingQAFinetuneDataset) -> dict[str, list[str]]:
    sources = {query_id: dataset.source_of(dataset.relevant_docs[query_id][0]) for query_id in dataset.queries}
    ranked = sorted(_grouped(sources, list(dict.fromkeys(sources.values()))).items(), key=lambda part: -len(part[1]))
    rest = [query_id for _, ids in ranked[_MAX_SOURCES:] for query_id in ids]
    return dict(ranked[:_MAX_SOURCES]) | ({f"{len(ranked) - _MAX_SOURCES} others": rest} if rest else {})
