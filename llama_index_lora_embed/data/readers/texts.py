"""Plain texts from whatever file holds some: to be embedded, or to compare two models on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llama_index.core.schema import MetadataMode

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.readers.nodes import read_nodes
from llama_index_lora_embed.data.readers.query_logs import read_queries

_COLUMNS = ("text", "passage", "content", "query")


def read_texts(path: str | os.PathLike[str], column: str | None = None) -> list[str]:
    """Texts of a file, in its order.

    Args:
        path: A `.txt` file with a text in each line; a folder of documents or a `.jsonl` file of nodes, as
            `read_nodes` reads them and indexing embeds them; the `.json` file of a dataset, for its passages; or a
            table that `read_pairs` reads.
        column: Of a table; None for "text", "passage", "content" or "query".

    Raises:
        ConfigError: A table has no such column.
        DatasetError: The file does not exist, cannot be read, or holds no text.
    """
    source = Path(path).expanduser()
    first = _first_object(source)
    if source.is_dir() or "class_name" in first:
        texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in read_nodes(source)]
    elif "corpus" in first:
        texts = list(EmbeddingQAFinetuneDataset.from_json(source).corpus.values())
    else:
        column = column or next((name for name in _COLUMNS if name in first), None)
        texts = [text for _, text in read_queries(source, column)[0]]
    if not texts:
        raise DatasetError(f"{str(path)!r} without any text", "at least one", "Check the file.")
    return texts


def _first_object(path: Path) -> dict[str, object]:
    """The JSON object that a file is or begins with, or the columns of a table; empty where there is neither."""
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            line = file.readline()
            if path.suffix in (".csv", ".tsv"):
                return dict.fromkeys(line.strip().replace("\t", ",").replace(";", ",").split(","))
            found = json.loads(line if path.suffix == ".jsonl" else line + file.read())
    except (OSError, ValueError):
        return {}
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, dict) else {}
