"""Sources of pairs (a query log, labelled pairs, a BEIR folder), read as `Pair`s.

A label of 0 or less means that the passage does not answer the query. Where the largest label is above 1 (TREC's 1 to
3, ratings of 1 to 5), every label is divided by it, so that the best is 1; a rating of 1 out of 5 is then a weak
answer (0.2), not a wrong one. That takes two readings, so that an iterator is read into memory first.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.readers.files import (
    PLACES,
    Entry,
    PairsReport,
    given_columns,
    number,
    numbered,
    path_entries,
    squeezed,
)

# the first name that a source has is taken; case and signs between words are ignored
_NAMES = {
    "query": "query question anchor sentence1 query_text search_query search_term user_query utterance prompt q",
    "passage": "passage positive pos positive_passages context chunk document paragraph text content answer response "
    "sentence2 passage_text document_text doc",
    "node_id": "node_id chunk_id passage_id corpus_id doc_id document_id pid",
    "score": "score label relevance relevant rating grade similarity is_relevant",
    "source_document": "source_document url uri source file_name file_path file link doc_id document_id",
    "negatives": "negatives negative neg negative_passages hard_negative",
}
_NEGATIVE = re.compile(r"(hard)?neg(ative)?s?(passages?|texts?|docs?|documents?)?\d*")


@dataclass(frozen=True)
class Pair:
    """A query and a passage, of which the text or the id is known.

    Attributes:
        score: How well the passage answers, from 0 (not at all) to 1.
        negatives: Texts that do not answer the query.
    """

    query: str
    passage: str | None = None
    node_id: str | None = None
    score: float = 1.0
    negatives: tuple[str, ...] = ()
    source_document: str | None = None


def read_pairs(
    source: Any, columns: Mapping[str, str | None] | None = None, split: str = "train"
) -> tuple[Iterator[tuple[str, Pair]], PairsReport]:
    """Read pairs one after another, after a first reading for the columns and the largest label, if there may be any.

    Args:
        source: One of
            - the path of a .parquet, .csv, .tsv, .jsonl or .json file (UTF-8; the latter four also with .gz after
              it). The first line of a table names its columns and shows what separates them: comma, semicolon, tab
              or |. A .json file is one list, or lines as in .jsonl;
            - a BEIR folder (corpus.jsonl, queries.jsonl, qrels/<split>.tsv). Only passages in the qrels are kept in
              memory; a title goes on a line of its own before the text;
            - a `datasets.Dataset`, a dict of them by split, or a pandas DataFrame;
            - an iterable of mappings, or of (query, passage) or (query, passage, label) tuples.
        columns: Names of columns that are not recognised: {"query": ..., "passage": ..., "node_id": ...,
            "score": ..., "negatives": ..., "source_document": ...}, as far as needed; None ignores a field.
        split: Qrels of a BEIR folder, or split of a dict of datasets.

    Returns:
        (place, pair) in the order of the source, for each passage where a row lists several; and the report, which is
        filled while they are read. Rows that cannot be used, among them those with an empty label, are skipped.

    Raises:
        ConfigError: No query or passage column was recognised, or `columns` names one that does not exist.
        DatasetError: The source does not exist or has no row that can be read.
    """
    source = list(source) if isinstance(source, Iterator) else source
    given = given_columns(columns)
    names = {squeezed(name) for name in _NAMES["score"].split()}
    largest: dict[str, float] = {}  # label by column
    labels = set()
    first = PairsReport()
    known = _column_names(source, split)
    if known and not any(column == given.get("score") or squeezed(column) in names for column in known):
        largest = dict.fromkeys(known, 1.0)  # without labels, one reading is enough
    for _, row in () if largest else _rows(source, split, first):
        for column, value in row.items():
            if column not in largest:
                largest[column] = 1.0
                if column == given.get("score") or squeezed(column) in names:
                    labels.add(column)
            if column in labels:
                with contextlib.suppress(ValueError):
                    largest[column] = max(largest[column], _grade(value))
    if not largest:
        raise nothing_usable(first)
    chosen, negatives = _choose(list(largest), given)
    shown = chosen | ({"negatives": ", ".join(negatives)} if negatives else {})
    report = PairsReport(columns=shown, largest_grade=largest.get(chosen.get("score", ""), 1.0))

    def pairs() -> Iterator[tuple[str, Pair]]:
        for where, row in _rows(source, split, report):
            report.rows += 1
            try:
                yield from ((where, pair) for pair in _pairs_of(row, chosen, negatives, report.largest_grade))
            except ValueError as error:
                report.skip(str(error), where)

    return pairs(), report


def read_queries(source: Any, column: str | None = None) -> tuple[list[tuple[str | None, str]], PairsReport]:
    """Read the queries of a log, which needs no passages.

    Args:
        source: A list of texts; a mapping of ids to texts; the path of a .txt file with a query in each line; or a
            source of `read_pairs`, of which only the queries are read.
        column: Name of the queries' column if it is not recognised.

    Returns:
        (id or None, text) of each query in the order of the source, and the report with the rows that were skipped.

    Raises:
        ConfigError: The source is of another type, or no column of queries was recognised.
        DatasetError: The file does not exist.
    """
    report = PairsReport()
    entries: Iterator[tuple[str | None, str, Any]]  # (id, place, row or text)
    if isinstance(source, Mapping) and all(isinstance(text, str) for text in source.values()):
        entries = ((str(key), f"query {key!r}", text) for key, text in source.items())
    elif isinstance(source, (str, os.PathLike)) and str(source).lower().endswith(".txt"):
        entries = ((None, where, text) for where, text in _lines(Path(source)))
    else:
        entries = ((None, where, entry) for where, entry in _entries(source, "train", report))
    found = []
    for query_id, where, entry in entries:
        report.rows += 1
        if isinstance(entry, Mapping):
            column = column or _query_column(entry)
            entry = entry.get(column)
        elif isinstance(entry, (tuple, list)):
            entry = next(iter(entry), None)
        try:
            if text := _text(entry):
                found.append((query_id, text))
            else:
                report.skip("row without query", where)
        except ValueError as error:
            report.skip(str(error), where)
    return found, report


def _lines(path: Path) -> Iterator[Entry]:
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DatasetError(f"{str(path)!r}, which cannot be read: {error}", "a text file", "Check the path.") from error
    return ((f"{path.name}, line {number}", line) for number, line in enumerate(text.splitlines(), 1))


def _query_column(row: Mapping[str, Any]) -> str:
    columns = {squeezed(str(column)): str(column) for column in list(row)[::-1]}
    for name in map(squeezed, _NAMES["query"].split()):
        if name in columns:
            return columns[name]
    raise ConfigError(
        f"the columns {', '.join(map(repr, [*row][:PLACES]))}",
        f"one for the query, such as {_NAMES['query']}",
        'Name it, as in column="my_column".',
    )


def _pairs_of(row: Mapping[str, Any], columns: dict[str, str], negatives: list[str], largest: float) -> list[Pair]:
    cell = {name: row.get(column) for name, column in columns.items()}
    query = _text(cell["query"])
    if not query:
        raise ValueError("row without query")
    passages: list[str | None] = [*_texts(cell.get("passage"))]
    node_id = _text(cell.get("node_id")) or None
    if not passages and not node_id:
        raise ValueError("row without passage")
    score = max(0.0, _grade(cell["score"]) / largest) if columns.get("score") in row else 1.0
    wrong = tuple(text for column in negatives for text in _texts(row.get(column)))
    source = _text(cell.get("source_document")) or None
    if len(passages) > 1:
        node_id = None  # one id cannot name several passages
    return [Pair(query, text, node_id, score, wrong, source) for text in passages or [None]]


def nothing_usable(report: PairsReport) -> DatasetError:
    """The error for a source without a usable row."""
    return DatasetError(
        f"a source without a usable row ({report.counts or 'it is empty'})",
        "at least one query with a passage that answers it",
        "Check that the file is complete and UTF-8, and that some labels, if there are any, are above 0. "
        "Pairs with the id of a node instead of its text need the nodes: QueryLogGenerator(source).",
        report.places,
    )


def _choose(found: list[str], given: Mapping[str, str | None]) -> tuple[dict[str, str], list[str]]:
    """(field to its column, columns of negatives)."""
    problems = [f"columns[{what!r}]: expected one of {', '.join(_NAMES)}" for what in given if what not in _NAMES]
    problems += [f"columns[{k!r}]={v!r}: no such column" for k, v in given.items() if v is not None and v not in found]
    chosen = {what: column for what, column in given.items() if column is not None}
    free = {squeezed(column): column for column in reversed(found) if column not in chosen.values()}
    for what, names in _NAMES.items():
        fitting = [free[key] for key in map(squeezed, names.split()) if free.get(key, "") not in ("", *chosen.values())]
        if what not in given and fitting:
            chosen[what] = fitting[0]
    negatives = [column for key, column in reversed(free.items()) if _NEGATIVE.fullmatch(key)]
    if "negatives" in given:
        negatives = [chosen["negatives"]] if "negatives" in chosen else []
    chosen.pop("negatives", None)
    if "query" not in chosen:
        problems.append(f"no column for the query, such as {_NAMES['query']}")
    if not {"passage", "node_id"} & set(chosen):
        problems.append(f"no column for the passage or its node's id, such as {_NAMES['passage']} {_NAMES['node_id']}")
    if problems:
        raise ConfigError(
            f"the columns {', '.join(map(repr, found[:PLACES]))}",
            "one for the query, and one for the passage or its node's id",
            'Name them, as in columns={"query": "my_column", "passage": "my_other_column"}; '
            "the first line of a table must hold the names.",
            problems,
        )
    return chosen, negatives


def _column_names(source: Any, split: str) -> list[str]:
    """The columns of a Hugging Face dataset that knows them; none for other sources."""
    found = getattr(source[split] if isinstance(source, Mapping) and split in source else source, "column_names", None)
    return found if isinstance(found, list) else []


def _rows(source: Any, split: str, report: PairsReport) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, cells by column) of each row, from the start of the source."""
    for where, entry in _entries(source, split, report):
        if isinstance(entry, Mapping):
            yield where, {str(key): value for key, value in entry.items()}
        elif isinstance(entry, (tuple, list)) and len(entry) in (2, 3):
            yield where, dict(zip(("query", "passage", "score"), entry, strict=False))
        else:
            report.skip("row that is neither a mapping nor (query, passage[, label])", where)


def _entries(source: Any, split: str, report: PairsReport) -> Iterator[Entry]:
    if isinstance(source, (str, os.PathLike)):
        return path_entries(Path(source), split, report)
    if isinstance(source, Mapping) and split in source:
        source = source[split]
    elif isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        keys = f" with the keys {', '.join(map(repr, source))}" if isinstance(source, Mapping) else ""
        raise ConfigError(
            f"a source of type {type(source).__name__}{keys}",
            "a path, a datasets.Dataset, or an iterable of mappings or (query, passage[, label]) tuples",
            "split=... selects a dataset from a dict of them.",
        )
    return numbered(source)


def _text(value: Any) -> str:
    """A cell's text without surrounding whitespace; "" if it has no visible character."""
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value  # pandas' ids
    if value is None or isinstance(value, (bool, bytes, Mapping, list, tuple)) or type(value).__name__ == "NAType":
        return ""
    text = str(value).strip()
    if text != text.encode(errors="ignore").decode():  # lone surrogates
        raise ValueError("text that is not UTF-8")
    return text if any(char.isprintable() and not char.isspace() for char in text) else ""


def _texts(value: Any) -> list[str]:
    """The texts of a cell: one, a list of them, or objects with text and perhaps a title."""
    value = value.tolist() if hasattr(value, "tolist") else value
    items = value if isinstance(value, (list, tuple)) else [value]
    parts = [(item.get("title"), item.get("text")) if isinstance(item, Mapping) else (item,) for item in items]
    return [text for cells in parts if (text := "\n".join(filter(None, map(_text, cells))))]


def _grade(value: Any) -> float:
    if str(value).strip().lower() in ("", "none", "nan", "<na>"):
        raise ValueError("row with an empty label")
    grade = number(value)
    if not isinstance(grade, float) or not math.isfinite(grade):
        raise ValueError("label that is not a number")
    return grade
