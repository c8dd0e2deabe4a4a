"""Some of a dataset's queries at a time, so that a mean hides nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset

_KEYWORDS = 40  # characters up to which what is no question is no sentence either
_SOURCES = 10  # documents with the most queries; the others stand together
_ASKS = re.compile(
    r"[?？؟]\s*$|^\s*(?:who|what|when|where|which|whose|whom|why|how|is|are|was|were|do|does|did|can|could|should|will)\b",
    re.IGNORECASE,
)

Slice = tuple[str, str, list[str]]


def slices_of(
    dataset: EmbeddingQAFinetuneDataset, model: Any, own: Mapping[str, Sequence[str]] | None = None
) -> list[Slice]:
    """The dataset's queries by length, style, origin, source document, and whether the model cuts their passages.

    Where all queries are in one part, that way of slicing is left out: it says nothing that the whole does not.

    Args:
        dataset: With at least one query.
        model: What cuts passages, if it is a `LoraEmbedding`; of others nobody knows.
        own: Further slices by name.

    Returns:
        (what by, name, query ids) of each part, none of them empty.

    Raises:
        DatasetError: A slice of `own` has no queries, or unknown ones.
    """
    wrong, mine = [], {}
    for name, given in (own or {}).items():
        ids = mine[name] = [given] if isinstance(given, str) else list(dict.fromkeys(given))
        unknown = [i for i in ids if i not in dataset.queries]
        if not ids:
            wrong.append(f"slice {name!r} has no queries")
        elif unknown:
            wrong.append(f"slice {name!r} names queries that are not in the dataset (e.g. {unknown[0]!r})")
    if wrong:
        raise DatasetError(
            f"{len(wrong)} slice(s) that cannot be judged", "ids of the dataset's queries", "Correct:", wrong
        )
    found: list[Slice] = []
    for by, parts in _ways(dataset, model):
        if len(parts) > 1:
            found += [(by, name, ids) for name, ids in parts.items()]
    return found + [("own", name, ids) for name, ids in mine.items()]


def _ways(dataset: EmbeddingQAFinetuneDataset, model: Any) -> Iterator[tuple[str, dict[str, list[str]]]]:
    characters = {i: len(text.strip()) for i, text in dataset.queries.items()}  # words are not written apart everywhere
    low, high = (int(np.quantile(list(characters.values()), q)) for q in (1 / 3, 2 / 3))
    names = (f"up to {low} characters", f"up to {high} characters", f"more than {high} characters")
    lengths = {i: names[0 if n <= low else 1 if n <= high else 2] for i, n in characters.items()}
    yield "length", _parts(lengths, list(dict.fromkeys(names)))
    styles = {i: _style(text) for i, text in dataset.queries.items()}
    yield "style", _parts(styles, ("question", "keywords", "statement"))
    origins = {i: (dataset.query_origins or {}).get(i, "unknown") for i in dataset.queries}
    yield "origin", _parts(origins, sorted(set(origins.values())))
    if dataset.source_documents:
        yield "source", _by_source(dataset)
    if (cut := cut_passages(dataset, model)) is not None:
        truncated = {
            i: "passage cut" if any(p in cut for p in dataset.relevant_docs[i]) else "passage whole"
            for i in dataset.queries
        }
        yield "truncated", _parts(truncated, ("passage whole", "passage cut"))


def _style(text: str) -> str:
    if _ASKS.search(text):
        return "question"
    return "keywords" if len(text.strip()) <= _KEYWORDS else "statement"


def _parts(of: Mapping[str, str], order: Sequence[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {name: [] for name in order}
    for query_id, name in of.items():
        parts[name].append(query_id)
    return {name: ids for name, ids in parts.items() if ids}


def _by_source(dataset: EmbeddingQAFinetuneDataset) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = defaultdict(list)
    for query_id in dataset.queries:
        parts[dataset.source_of(dataset.relevant_docs[query_id][0])].append(query_id)
    ranked = sorted(parts.items(), key=lambda part: -len(part[1]))
    rest = [query_id for _, ids in ranked[_SOURCES:] for query_id in ids]
    return dict(ranked[:_SOURCES]) | ({f"{len(ranked) - _SOURCES} others": rest} if rest else {})


def cut_passages(dataset: EmbeddingQAFinetuneDataset, model: Any) -> set[str] | None:
    """Ids of the relevant passages that are longer than the model reads; None if that cannot be known.

    Args:
        dataset: Questions and passages.
        model: An embedding model; what has a limit says so by `is_cut`, as `LoraEmbedding` does.
    """
    is_cut = getattr(model, "is_cut", None)
    if is_cut is None:
        return None
    ids = sorted(dataset.answer_ids())
    return {i for i, cut in zip(ids, is_cut([dataset.corpus[i] for i in ids]), strict=True) if cut}
