"""The output of a large input: one Parquet file for each part, that Ray Data hands to workers and repeats if one dies.

A file has the part's number as its name and appears whole, so that a part that runs twice leaves one file, the files'
names are in the order of the input, and a run that is started again goes on with the parts that are missing.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from llama_index_lora_embed.core.errors import OutputDirectoryError
from llama_index_lora_embed.data.questions.base import attached_queries, embed_text
from llama_index_lora_embed.data.readers.parts import NODE_COLUMN, Part, Row

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
