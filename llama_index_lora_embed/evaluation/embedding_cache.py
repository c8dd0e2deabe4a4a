"""Embeddings on disk, by model, side and text, so that an API is paid once."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.core.errors import OutputDirectoryError
from llama_index_lora_embed.evaluation.search import FloatArray

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_LOCK_TIMEOUT = 60  # seconds that one process waits for another that writes
# settings that do not change a vector, and secrets, by a part of their names
_NOT_IDENTITY = re.compile(
    r"key$|token$|secret|password|^auth|authori|header|credential|timeout|retries|batch_size|num_workers|callback|cache|client"
    r"|limiter|progress",
    re.IGNORECASE,
)


class EmbeddingCache:
    """A SQLite file of vectors by text, which several processes can use at once; the first write creates it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self, texts: Sequence[str]) -> dict[str, FloatArray]:
        """The cached vectors by text. A damaged file is removed and counts as empty."""
        if not self.file.exists():
            return {}
        keys = {_key(text): text for text in texts}
        query = "SELECT key, vector FROM vectors WHERE key IN (SELECT value FROM json_each(?))"
        try:
            with closing(sqlite3.connect(self.file, timeout=_LOCK_TIMEOUT)) as database:
                found = database.execute(query, [json.dumps([*keys])]).fetchall()
        except sqlite3.DatabaseError as error:
            if "no such table" in str(error):  # another process has just created the file
                return {}
            if not isinstance(error, sqlite3.OperationalError):
                with suppress(OSError):
                    self.file.unlink()
                return {}
            raise self._unwritable(error) from error
        vectors = {keys[key]: np.frombuffer(data, dtype=np.float32) for key, data in found if len(data) % 4 == 0}
        return {text: vector for text, vector in vectors.items() if len(vector) and np.isfinite(vector).all()}

    def write(self, texts: Sequence[str], vectors: Sequence[FloatArray]) -> None:
        """Write the vectors of texts that are not in the file yet, except those with NaN or infinity.

        Raises:
            OutputDirectoryError: The file cannot be written.
        """
        rows = [(_key(t), v.tobytes()) for t, v in zip(texts, vectors, strict=True) if np.isfinite(v).all()]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.file, timeout=_LOCK_TIMEOUT)) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS vectors (key TEXT PRIMARY KEY, vector BLOB) WITHOUT ROWID")
                database.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)
        except (OSError, sqlite3.Error) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> OutputDirectoryError:
        return OutputDirectoryError(
            f"a cache folder {str(self.file.parent)!r} that cannot be used ({error})",
            "a writable folder with room for the vectors",
            "Pass another cache_folder, or None.",
        )


def model_identity(embed_model: BaseEmbedding) -> tuple[str, bool]:
    """A file name for an embedding model, and whether it covers everything that determines the vectors.

    The fingerprint of a `LoraEmbedding` does. For other models it is a digest of the class, of the settings (except
    secrets and those that only affect speed), and of names, sizes and times of the files if `model_name` is a folder.
    Private state of a model is not covered.
    """
    from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

    if isinstance(embed_model, LoraEmbedding):
        return str(embed_model.fingerprint), True
    cls = type(embed_model)
    settings = {k: v for k, v in embed_model.to_dict().items() if not _NOT_IDENTITY.search(k)}
    identity = [cls.__module__, cls.__qualname__, settings, _model_files(embed_model.model_name)]
    text = json.dumps(identity, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40], False


def _model_files(model_name: Any) -> list[Any]:
    try:
        folder = Path(str(model_name))
        if not any((folder / name).is_file() for name in ("config.json", "modules.json", "adapter_config.json")):
            return []
        stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    except (OSError, ValueError):  # not a valid path
        return []
    return [[str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
