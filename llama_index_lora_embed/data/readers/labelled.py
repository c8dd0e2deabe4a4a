"""Rows of labelled pairs: columns are recognised by name, labels scaled to 0 to 1, invalid rows named."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, TypeAlias

from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.readers.files import Entry, given_columns, number, squeezed

Columns: TypeAlias = "Mapping[str, str] | Sequence[str] | None"
Scale: TypeAlias = "tuple[float, float] | None"

# squeezed names; of those that a source has, the first pair of texts and the first label are taken
_SYMMETRIC = [
    ("sentence1", "sentence2"),
    ("sentence0", "sentence1"),
    ("text1", "text2"),
    ("text0", "text1"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    *((f"{name}a", f"{name}b") for name in ("sentence", "text")),
]
_ROLES = [*product(("query", "question", "anchor"), ("passage", "document", "answer", "context", "text", "positive"))]
_LABELS = "score label similarity similarityscore goldscore goldlabel labels isduplicate isparaphrase relatedness "
_LABELS += "relatednessscore relevance relevant isrelevant rating grade"
_FIELDS = ("text1", "text2", "score")


def read_rows(
    entries: Iterable[Entry], columns: Columns, scale: Scale, source: str | None
) -> tuple[list[str], list[str], list[float], bool]:
    """Read labelled pairs; the arguments and errors are those of `LabelledPairs.from_rows`.

    Returns:
        First texts, second texts, labels from 0 to 1, and whether the columns are named as a query and a passage.
    """
    try:
        low, high = map(float, scale or (0, 1))
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(high - low) and low < high):
        raise ConfigError(
            f"scale={scale!r}", "the lowest and the highest label, such as (0, 5)", "Leave it out for labels 0 to 1."
        )
    rows: list[tuple[str, Mapping[str, Any]]] = []
    problems = []
    for where, entry in entries:
        if row := _cells(entry):
            rows.append((where, row))
        else:
            problems.append(f"{where} is neither a mapping nor (text, text, label): {entry!r:.80}")
    if not rows:
        got = f"{source or 'a source'} without a row of labelled pairs"
        raise DatasetError(got, "rows of (text, text, label)", "Check that it is complete.", problems)
    first, second, label, roles = choose_columns(list(dict.fromkeys(name for _, row in rows for name in row)), columns)
    texts1: list[Any] = [row.get(first) for _, row in rows]
    texts2: list[Any] = [row.get(second) for _, row in rows]
    scores: list[Any] = [number(row.get(label)) for _, row in rows]
    problems += faults(texts1, texts2, scores, (low, high), lambda index: rows[index][0])
    if problems:
        raise DatasetError(
            f"{source or 'rows'} with {len(problems)} problem(s) in the columns {first!r}, {second!r} and {label!r}",
            f"two texts and a label from {low:g} to {high:g} in each row",
            f"{scale_hint(scores, (low, high))}Correct or remove these:",
            problems,
        )
    scores = [(score - low) / (high - low) for score in scores]
    return texts1, texts2, scores, roles


def choose_columns(found: list[str], given: Columns) -> tuple[str, str, str, bool]:
    """(column of the first text, of the second, of the label, whether they are named as a query and a passage)."""
    given = given_columns(given, _FIELDS)
    problems = [f"columns[{key!r}]: expected one of {', '.join(_FIELDS)}" for key in given if key not in _FIELDS]
    problems += [f"columns[{key!r}]={name!r}: no such column" for key, name in given.items() if name not in found]
    free = {squeezed(name): name for name in reversed(found) if name not in given.values()}
    named = [(given.get("text1", free.get(a)), given.get("text2", free.get(b))) for a, b in [*_SYMMETRIC, *_ROLES]]
    first, second = next((pair for pair in named if all(pair)), (given.get("text1"), given.get("text2")))
    label = given.get("score", next((free[name] for name in _LABELS.split() if name in free), None))
    chosen = dict(zip(_FIELDS, (first, second, label), strict=True))
    problems += [f"no column was recognised for {what}" for what, name in chosen.items() if name is None]
    twice = {name for name, count in Counter(chosen.values()).items() if name is not None and count > 1}
    problems += [f"{name!r} cannot be two columns at once" for name in sorted(twice)]
    if problems or first is None or second is None or label is None:
        raise ConfigError(
            f"the columns {', '.join(map(repr, found[:20]))}",
            "two columns of texts, such as sentence1 and sentence2 or query and passage, and a label, such as score",
            'Name them, as in columns={"text1": "my_column", "text2": "my_other", "score": "my_label"}; '
            "the first line of a table must hold the names.",
            problems,
        )
    return first, second, label, (squeezed(first), squeezed(second)) in _ROLES


def refuse_classes(dataset: Any, columns: Columns) -> None:
    """Raise a `DatasetError` if the labels of a Hugging Face dataset are classes such as entailment."""
    if not (names := getattr(dataset, "column_names", None)):
        return
    label = choose_columns(list(names), columns)[2]
    classes = getattr((getattr(dataset, "features", None) or {}).get(label), "names", None) or []
    if entailed := [index for index, name in enumerate(classes) if name.lower().startswith("entail")]:
        hint = f'dataset.map(lambda row: {{"score": float(row[{label!r}] == {entailed[0]})}}) adds a column of them.'
        raise DatasetError(f"the classes {', '.join(classes)} as labels", "labels that grow with similarity", hint)


def _cells(entry: Any) -> Mapping[str, Any] | None:
    """A row's cells by column; None if it is not a row."""
    if isinstance(entry, Mapping):
        return {str(key): value for key, value in entry.items()}
    if hasattr(entry, "texts") and hasattr(entry, "label"):  # sentence-transformers' InputExample
        entry = (*entry.texts, entry.label)
    return dict(zip(_FIELDS, entry, strict=True)) if isinstance(entry, (tuple, list)) and len(entry) == 3 else None


def faults(
    texts1: list[Any], texts2: list[Any], scores: list[Any], scale: tuple[float, float], place: Callable[[int], str]
) -> list[str]:
    """One line for each text that is not text or empty, and each label that is not a number or outside the scale."""
    found = []
    for which, texts in (("first", texts1), ("second", texts2)):
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                found.append(f"{place(index)}: the {which} text is not text: {text!r:.80}")
            elif not text.strip():
                found.append(f"{place(index)}: the {which} text is empty")
            elif text != text.encode(errors="ignore").decode():  # lone surrogates, at which tokenizers raise
                found.append(f"{place(index)}: the {which} text is not UTF-8")
    for index, score in enumerate(scores):
        if not isinstance(score, float) or not math.isfinite(score):
            found.append(f"{place(index)}: the label is not a number: {score!r:.80}")
        elif not scale[0] <= score <= scale[1]:
            found.append(f"{place(index)}: the label {score:g} is outside {scale[0]:g} to {scale[1]:g}")
    return found


def scale_hint(scores: list[Any], scale: tuple[float, float]) -> str:
    """The `scale` to pass, in a sentence, if labels lie outside the assumed one; else an empty text."""
    numbers = [score for score in scores if isinstance(score, float) and math.isfinite(score)]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    if scale[0] <= low <= high <= scale[1] or not numbers:
        return ""
    return f"The labels run from {low:g} to {high:g}; if that is their scale, pass scale=({low:g}, {high:g}). "
