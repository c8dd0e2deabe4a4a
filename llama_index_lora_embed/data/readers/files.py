"""Files of pairs, row by row: tables, JSON lines, JSON lists, Parquet and BEIR folders.

CSV and JSON are read with the standard library, not with `datasets`, which guesses types ("007" becomes 7), stops at
the first row that it cannot read, does not say where a row stands, and leaves a copy in the user's cache.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

from llama_index_lora_embed.core.errors import ConfigError, DatasetError

Entry: TypeAlias = "tuple[str, Any]"  # (file and line or row number, content)

PLACES = 20
"""Skipped rows that a report names, as many as an error shows."""

_LABEL_WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}


@dataclass
class PairsReport:
    """How the rows of a source were used; filled while they are read.

    Attributes:
        rows: Rows read, including those skipped later, without those that could not be parsed.
        pairs: Pairs used as positives.
        negatives: (query, hard negative) pairs used.
        columns: Field to the column that it was read from.
        largest_grade: Number that labels were divided by; 1 if none was above 1.
        skipped: Rows and texts left out, by reason.
        places: The first 20 of them with line or row number.
    """

    rows: int = 0
    pairs: int = 0
    negatives: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    largest_grade: float = 1.0
    skipped: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def skip(self, reason: str, where: str = "", detail: object = "") -> None:
        """Count something that is left out; `where` is a file and line, or a row."""
        self.skipped[reason] += 1
        if where and len(self.places) < PLACES:
            self.places.append(f"{where}: {reason}" + (f" ({detail})" if detail else ""))

    @property
    def counts(self) -> str:
        """Reasons with their counts."""
        return ", ".join(f"{reason}: {count}" for reason, count in self.skipped.items())


def numbered(rows: Any) -> Iterator[Entry]:
    """Rows of an iterable or a DataFrame with their number, counted from 1."""
    if hasattr(rows, "itertuples"):  # iterating over a DataFrame yields its columns
        rows = rows.to_dict("records")
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def number(value: Any) -> Any:
    """The value as a float if it stands for a number, otherwise unchanged."""
    try:
        word = value.strip().lower() if isinstance(value, str) else value
        return _LABEL_WORDS[word] if isinstance(word, str) and word in _LABEL_WORDS else float(word)
    except (TypeError, ValueError, OverflowError):
        return value


def given_columns(columns: Any, in_order: Sequence[str] = ()) -> Mapping[str, Any]:
    """The `columns` argument of readers, checked; empty for None.

    Args:
        columns: Names of columns by field, or in a tuple or list.
        in_order: The fields that such a tuple names; none if a reader takes no tuple.
    """
    if in_order and isinstance(columns, (tuple, list)) and len(columns) == len(in_order):
        return dict(zip(in_order, columns, strict=True))
    if columns is not None and not isinstance(columns, Mapping):
        fields = in_order or ("query",)
        expected = f"a dict, or the {len(in_order)} names in a tuple" if in_order else "a dict"
        named = ", ".join(f'"{field}": "my_{field}"' for field in fields)
        raise ConfigError(f"columns={columns!r:.80}", expected, f"Name columns by field: {{{named}}}.")
    return columns or {}


def squeezed(name: str) -> str:
    """A column's name in lower case without signs and spaces."""
    return re.sub(r"[\W_]+", "", name.lower())


def path_entries(path: Path, split: str, report: PairsReport) -> Iterator[Entry]:
    """Yield the rows of a file, mostly as mappings, or the qrels of a BEIR folder with their texts.

    Raises:
        ConfigError: The file has another ending.
        DatasetError: There is no such file, it is UTF-16, or the folder lacks a file.
    """
    if path.is_dir():
        yield from _beir_entries(path, split, report)
        return
    if not path.is_file():
        raise DatasetError(f"{str(path)!r}, which does not exist", "a file or a BEIR folder", "Check the path.")
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    readers = {".csv": _table, ".tsv": _table, ".jsonl": _json_lines, ".json": _json_list}
    if suffix not in readers and not name.endswith(".parquet"):
        raise ConfigError(
            f"{str(path)!r}",
            f"a file that ends in .parquet, or in {', '.join(readers)} (or .gz after it)",
            "Read other formats with pandas or datasets, and pass the DataFrame or Dataset.",
        )
    try:
        if suffix not in readers:
            yield from _parquet(path)
            return
        opener = gzip.open if name.endswith(".gz") else open
        with opener(path, "rb") as start:
            if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise DatasetError(f"{str(path)!r} in UTF-16", "UTF-8", "Save it as UTF-8 (in Excel: CSV UTF-8).")
        # bytes that are not UTF-8 become surrogates, so that only the rows that hold them are lost
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from readers[suffix](file, path.name, report)
    except (OSError, EOFError, zlib.error) as error:
        report.skip("rest of a file that cannot be read", path.name, error)


def _parquet(path: Path) -> Iterator[Entry]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            yield from ((f"{path.name}, {where}", row) for where, row in numbered(rows))
    except ArrowException as error:
        raise OSError(*error.args) from error


def _table(file: IO[str], name: str, report: PairsReport) -> Iterator[Entry]:
    first = file.readline()
    marks = "\t,;|" if ".tsv" in name.lower() else ",;\t|"
    mark = max(marks, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
    # strict, so that a quote that is never closed is an error and not a passage that holds the rest of the file
    reader = csv.reader(chain([first], file), delimiter=mark, strict=True)
    header: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report.skip("row that cannot be read", f"{name}, lines {start} to {reader.line_num}", error)
            continue
        if not header:
            header = [cell.strip() for cell in cells]
        elif (len(cells) < len(header) and any(cells)) or any(cells[len(header) :]):
            detail = f"{len(cells)} cells under {len(header)} columns"
            report.skip("row that cannot be read", f"{name}, line {start}", detail)
        elif any(cells):
            yield f"{name}, line {start}", dict(zip(header, cells, strict=False))  # more cells, but empty ones


def _json_lines(file: IO[str], name: str, report: PairsReport) -> Iterator[Entry]:
    for number, line in enumerate(file, 1):
        where = f"{name}, line {number}"
        try:
            if line.strip():
                yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            report.skip("row that cannot be read", where, error)


def _json_list(file: IO[str], name: str, report: PairsReport) -> Iterator[Entry]:
    """The entries of one list, or JSON lines, which often have the ending .json, too."""
    is_list = file.read(1) == "["
    file.seek(0)
    if not is_list:
        yield from _json_lines(file, name, report)
        return
    try:
        yield from ((f"{name}, entry {number}", entry) for number, entry in enumerate(json.load(file), 1))
    except (ValueError, RecursionError) as error:
        report.skip("list that cannot be read", name, error)


def _beir_entries(folder: Path, split: str, report: PairsReport) -> Iterator[Entry]:
    packed = {name: folder / f"{name}.gz" for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")}
    paths = {name: path if path.is_file() else folder / name for name, path in packed.items()}
    if missing := [f"no {name}" for name, path in paths.items() if not path.is_file()]:
        splits = ", ".join(sorted(path.name.split(".")[0] for path in folder.glob("qrels/*.tsv*"))) or "none"
        raise DatasetError(
            f"the folder {str(folder)!r} with the splits: {splits}",
            f"a BEIR folder with corpus.jsonl, queries.jsonl and qrels/{split}.tsv",
            "Pass split=... for other qrels, or the path of one file of pairs.",
            missing,
        )
    corpus, queries, qrels = paths.values()
    entries = [(w, (row.get("query-id"), row.get("corpus-id"), row)) for w, row in path_entries(qrels, split, report)]
    query_texts = _texts(queries, {query for _, (query, _, _) in entries}, report)
    passage_texts = _texts(corpus, {passage for _, (_, passage, _) in entries}, report)
    for where, (query, passage, row) in entries:
        if query in query_texts and passage in passage_texts:
            cells = {"query": query_texts[query]["text"], "node_id": passage, "passage": passage_texts[passage]}
            yield where, {**cells, "score": row.get("score")}
        else:
            report.skip("qrel of a query or passage that does not exist", where)


def _texts(path: Path, wanted: set[Any], report: PairsReport) -> dict[str, dict[str, Any]]:
    """Title and text of the wanted ids."""
    found: dict[str, dict[str, Any]] = {}
    for where, row in path_entries(path, "", report):
        key = str(row.get("_id")) if isinstance(row, dict) else ""
        if key in wanted:
            texts = {"title": row.get("title"), "text": row.get("text")}
            if found.setdefault(key, texts) != texts:
                report.skip("id that has another text already", where)
    return found
