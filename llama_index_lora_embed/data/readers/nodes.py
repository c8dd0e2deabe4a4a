"""Nodes by reference: a folder of documents, or a file of LlamaIndex nodes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llama_index.core.schema import BaseNode, TextNode

from llama_index_lora_embed.core.errors import DatasetError


def read_nodes(path: str | os.PathLike[str]) -> list[BaseNode]:
    """Nodes from a folder or a file.

    A folder is read by LlamaIndex's `SimpleDirectoryReader` and split by its `SentenceSplitter`, both at their
    defaults; a `.jsonl` file holds one node in each line, as `node.to_json()` writes it. A `.parquet` file, or a folder
    that holds such files, has nodes in its column "node", as `distributed.generate_queries` writes them.

    Raises:
        DatasetError: Nothing is there, or a line is no node.
    """
    source = Path(path).expanduser()
    tables = [source] if source.suffix == ".parquet" and source.is_file() else sorted(source.glob("*.parquet"))
    if tables:
        return [node for table in tables for node in _parquet_nodes(table)]
    if source.is_dir():
        from llama_index.core import SimpleDirectoryReader
        from llama_index.core.node_parser import SentenceSplitter

        try:
            documents = SimpleDirectoryReader(str(source), recursive=True, filename_as_id=True).load_data()
        except ValueError as error:
            raise DatasetError(f"{str(source)!r}: {error}", "a folder with documents", "Check the path.") from error
        return SentenceSplitter().get_nodes_from_documents(documents)
    if source.suffix != ".jsonl" or not source.is_file():
        raise DatasetError(
            f"nodes from {str(source)!r}, which is {'a file of another kind' if source.exists() else 'not there'}",
            "a folder of documents, or a .jsonl or .parquet file of LlamaIndex nodes",
            "Write one with node.to_json(), or check the path.",
        )
    nodes: list[BaseNode] = []
    for number, line in enumerate(source.read_bytes().split(b"\n"), start=1):
        try:
            if line.strip():
                nodes.append(TextNode.from_dict(json.loads(line)))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DatasetError(
                f"line {number} of {str(source)!r}, which is no node ({error})",
                "a line that node.to_json() wrote",
                "Remove or correct the line.",
            ) from error
    return nodes


def _parquet_nodes(path: Path) -> list[BaseNode]:
    """The nodes of a file; rows without one, which could not be read, are left out."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            lines = file.read(columns=["node"]).column("node").to_pylist()
            return [TextNode.from_dict(json.loads(line)) for line in lines if line is not None]
    except (ArrowException, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{str(path)!r}, which has no nodes in a column 'node' ({error})",
            "a file that distributed.generate_queries or embed_dataset wrote",
            "Check the file.",
        ) from error
