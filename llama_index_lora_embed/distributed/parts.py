"""A large input in parts, one Parquet file written for each: what Ray Data hands to workers, and repeats if one dies.

A part is a range of bytes of a JSONL file, or of rows of a Parquet file. Its output has the part's number as its name
and appears whole, so that a part that runs twice leaves one file, the files' names are in the order of the input, and a
run that is started again goes on with the parts that are missing.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from llama_index.core.schema import BaseNode, TextNode

from llama_index_lora_embed.core.errors import DatasetError, OutputDirectoryError
from llama_index_lora_embed.data.questions.base import attached_queries, embed_text

NODE_COLUMN = "node"
_TEXTS = ("text", "passage", "content")
_IDS = ("id", "_id", "node_id")
_PLAN = "_parts.json"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        (NODE_COLUMN, pa.string()),
        ("embedding", pa.list_(pa.float32())),
        ("queries", pa.int32()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Part:
    """A range of bytes (JSONL) or rows (Parquet) of a file; it is the `number`th of the input."""

    number: int
    path: str
    start: int
    stop: int


@dataclass
class Row:
    """A row on its way through a worker; what went wrong with it is kept beside it."""

    id: str
    node: BaseNode | None
    error: str | None = None


def plan_parts(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], part_bytes: int) -> list[Part]:
    """The parts of files, in the order of their names within a folder, of at most about `part_bytes` each.

    Raises:
        DatasetError: There is no such file, or it is neither JSONL nor Parquet.
    """
    paths = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    found = [file for path in paths for file in _files(os.fspath(path))]
    parts: list[Part] = []
    for path in found:
        fs, name = fsspec.core.url_to_fs(path)
        end = size = fs.size(name)
        if path.endswith(".parquet"):
            with fs.open(name, "rb") as file:
                end = pq.read_metadata(file).num_rows
        step = max(1, part_bytes * end // max(size, 1))
        parts += [
            Part(len(parts) + i, path, start, min(start + step, end)) for i, start in enumerate(range(0, end, step))
        ]
    return parts


def _files(path: str) -> list[str]:
    place = path if "://" in path else os.path.abspath(os.path.expanduser(path))
    fs, name = fsspec.core.url_to_fs(place)
    if fs.isdir(name):
        inside = sorted(file for end in ("jsonl", "parquet") for file in fs.glob(f"{name}/*.{end}"))
        found = [str(fs.unstrip_protocol(file)) if "://" in place else file for file in inside]
    else:
        found = [place] if fs.exists(name) and place.endswith((".jsonl", ".parquet")) else []
    if not found:
        raise DatasetError(
            f"{path!r}, which {'is another kind of file' if fs.isfile(name) else 'has no such files'}",
            "a .jsonl or .parquet file, or a folder of them",
            "Write nodes with node.to_json() as lines of a .jsonl file, or a table with the columns 'id' and 'text'.",
        )
    return found


def read_part(part: Part, id_column: str | None, text_column: str | None) -> list[Row]:
    """The nodes of a part; a row that is none has an error in its place."""
    rows = []
    for where, value in _values(part):
        try:
            node = _node(json.loads(value) if isinstance(value, bytes) else value, id_column, text_column)
            rows.append(Row(node.node_id, node))
        except Exception as error:
            rows.append(Row(where, None, f"no node: {type(error).__name__}: {error}"))
    return rows


def _values(part: Part) -> Iterator[tuple[str, Any]]:
    """(where it stands, a line or a dict of columns); a line belongs to the part in which it begins."""
    fs, name = fsspec.core.url_to_fs(part.path)
    base = os.path.basename(part.path)
    with fs.open(name, "rb") as file:
        if part.path.endswith(".parquet"):
            table, skipped = _row_groups(pq.ParquetFile(file), part)
            for number, row in enumerate(table.slice(part.start - skipped, part.stop - part.start).to_pylist()):
                yield f"{base}, row {part.start + number + 1}", row
            return
        position = part.start
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < part.stop and (line := file.readline()):
            if line.strip():
                yield f"{base}, byte {position}", line
            position += len(line)


def _row_groups(file: pq.ParquetFile, part: Part) -> tuple[pa.Table, int]:
    """The row groups that overlap a part, and the number of rows before them."""
    groups, skipped, row = [], 0, 0
    for number in range(file.num_row_groups):
        count = file.metadata.row_group(number).num_rows
        if row + count <= part.start:
            skipped = row + count
        elif row < part.stop:
            groups.append(number)
        row += count
    return file.read_row_groups(groups), skipped


def _node(row: Mapping[str, Any], id_column: str | None, text_column: str | None) -> BaseNode:
    if isinstance(row.get(NODE_COLUMN), str):
        row = json.loads(row[NODE_COLUMN])
    if "class_name" in row:
        return TextNode.from_dict(dict(row))
    names = [
        next((name for name in ([given] if given else usual) if row.get(name) is not None), None)
        for given, usual in ((id_column, _IDS), (text_column, _TEXTS))
    ]
    for name, kind, given, usual in zip(
        names, ("an id", "a text"), (id_column, text_column), (_IDS, _TEXTS), strict=True
    ):
        if name is None:
            wanted = repr(given) if given else " or ".join(map(repr, usual))
            raise ValueError(f"{kind} is missing: columns {', '.join(map(repr, row))}, without {wanted}")
    node_id, text = (row[str(name)] for name in names)
    kept = {key: value for key, value in row.items() if key not in names and isinstance(value, (str, int, float))}
    excluded = list(kept)
    return TextNode(
        id_=str(node_id),
        text=str(text),
        metadata=kept,
        excluded_embed_metadata_keys=excluded,
        excluded_llm_metadata_keys=excluded,
    )


class Output:
    """The folder of a run's files, on a local disk or any file system that fsspec knows."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        self.path = text if "://" in text else os.path.abspath(os.path.expanduser(text))
        self._fs, self._folder = fsspec.core.url_to_fs(self.path)

    def missing(self, parts: Sequence[Part], settings: Mapping[str, Any]) -> list[Part]:
        """The parts without a file; the folder is made, and remembers what it belongs to.

        Raises:
            OutputDirectoryError: The folder holds something else, or what another input or other settings gave.
        """
        plan = {"parts": [[part.path, part.start, part.stop] for part in parts], **settings}
        place = f"{self._folder}/{_PLAN}"
        self._fs.makedirs(self._folder, exist_ok=True)
        there = {os.path.basename(name) for name in self._fs.ls(self._folder, detail=False)}
        if _PLAN in there:
            earlier = json.loads(self._fs.cat_file(place))
            different = sorted(key for key in {*plan, *earlier} if plan.get(key) != earlier.get(key))
        else:
            different = ["other files"] if there else []
        if different:
            raise OutputDirectoryError(
                f"{self.path!r}, which holds the output of another run (different: {', '.join(different)})",
                "an empty folder, or the output of the same run",
                "Choose another folder, or remove this one.",
            )
        self._fs.pipe_file(place, json.dumps(plan).encode())
        return [part for part in parts if _name(part.number) not in there]

    def write(self, part: Part, rows: Sequence[Row], vectors: Sequence[Any] | None = None) -> None:
        """Write a part's file; it appears whole."""
        table = pa.table(
            {
                "id": [row.id for row in rows],
                "text": [None if row.node is None else embed_text(row.node) for row in rows],
                NODE_COLUMN: [None if row.node is None else json.dumps(row.node.to_dict()) for row in rows],
                "embedding": [None] * len(rows) if vectors is None else vectors,
                "queries": [0 if row.node is None else len(attached_queries(row.node)) for row in rows],
                "error": [row.error for row in rows],
            },
            schema=SCHEMA,
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        target, local = f"{self._folder}/{_name(part.number)}", "://" not in self.path
        staging = f"{self._folder}/.{uuid.uuid4().hex}" if local else target  # object stores show whole files only
        self._fs.pipe_file(staging, sink.getvalue().to_pybytes())
        if local:
            os.replace(staging, target)

    def read(self, part_number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A part's file."""
        with self._fs.open(f"{self._folder}/{_name(part_number)}", "rb") as file:
            return pq.read_table(file, columns=columns)


def _name(number: int) -> str:
    return f"part-{number:08}.parquet"
