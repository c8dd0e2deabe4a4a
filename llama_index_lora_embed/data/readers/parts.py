"""A large input in parts: ranges of bytes of JSONL files, or of rows of Parquet files, of nodes or ids with texts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from llama_index.core.schema import BaseNode, TextNode

from llama_index_lora_embed.core.errors import DatasetError

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
NODE_COLUMN = "node"
_TEXTS = ("text", "passage", "content")
_IDS = ("id", "_id", "node_id")


@dataclass(frozen=True)
class Part:
    """A range of bytes (JSONL) or rows (Parquet) of a file; it is the `number`th of the input."""

    number: int
    path: str
    start: int
    stop: int

    @property
    def is_table(self) -> bool:
        """Whether the file is Parquet."""
        return self.path.endswith(".parquet")


@dataclass
class Row:
    """A row on its way through a worker; what went wrong with it is kept beside it."""

    id: str
    node: BaseNode | None
    error: str | None = None


def plan_parts(source: Source, part_bytes: int) -> list[Part]:
    """The parts of files, in the order of their names within a folder, of at most about `part_bytes` each.

    Raises:
        DatasetError: There is no such file, or it is neither JSONL nor a whole Parquet file.
    """
    paths = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    found = [file for path in paths for file in _files(os.fspath(path))]
    parts: list[Part] = []
    for path in found:
        fs, name = fsspec.core.url_to_fs(path)
        end = size = fs.size(name)
        if path.endswith(".parquet"):
            end = _table_rows(fs, name)
        step = max(1, part_bytes * end // max(size, 1))
        parts += [
            Part(len(parts) + i, path, start, min(start + step, end)) for i, start in enumerate(range(0, end, step))
        ]
    return parts


def _table_rows(fs: Any, name: str) -> int:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        with fs.open(name, "rb") as file:
            return int(read_metadata(file).num_rows)
    except ArrowException as error:
        raise DatasetError(f"{name!r}, which is no Parquet file ({error})", "a whole one", "Write it again.") from error


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


def read_part(part: Part, id_column: str | None = None, text_column: str | None = None) -> Iterator[Row]:
    """The nodes of a part; a row that is none has an error in its place."""
    for where, value in _values(part):
        try:
            node = _node(json.loads(value) if isinstance(value, bytes) else value, id_column, text_column)
            yield Row(node.node_id, node)
        except Exception as error:
            yield Row(where, None, f"no node: {type(error).__name__}: {error}")


def _values(part: Part) -> Iterator[tuple[str, Any]]:
    """(where it stands, a line or a dict of columns)."""
    base = os.path.basename(part.path)
    if part.is_table:
        for number, row in enumerate(part_table(part).to_pylist(), part.start + 1):
            yield f"{base}, row {number}", row
    else:
        for position, line in part_lines(part):
            yield f"{base}, byte {position}", line


def part_lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """(position, line) of each line that begins in a part and is not blank."""
    fs, name = fsspec.core.url_to_fs(part.path)
    with fs.open(name, "rb") as file:
        position = part.start
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < part.stop and (line := file.readline()):
            if line.strip():
                yield position, line
            position += len(line)


def part_table(part: Part) -> Any:
    """The rows of a part as a `pyarrow.Table`; the row groups that overlap it are read."""
    from pyarrow.parquet import ParquetFile

    fs, name = fsspec.core.url_to_fs(part.path)
    with fs.open(name, "rb") as opened:
        file = ParquetFile(opened)
        groups, skipped, row = [], 0, 0
        for number in range(file.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            if row + count <= part.start:
                skipped = row + count
            elif row < part.stop:
                groups.append(number)
            row += count
        return file.read_row_groups(groups).slice(part.start - skipped, part.stop - part.start)


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
