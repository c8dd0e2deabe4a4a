"""Vectors on disk, by model, side and text, so that an API is paid once."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.core.errors import OutputDirectoryError
from llama_index_lora_embed.evaluation.search import FloatArray

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_PATIENCE = 60  # seconds that one process waits for another to have written
# what does not decide a vector, and what a digest should not be made of, by a part of its name
_NOT_IDENTITY = re.compile(
    r"key$|token$|secret|password|^auth|authori|header|credential|timeout|retries|batch_size|num_workers|callback|cache|client"
    r"|limiter|progress",
    re.IGNORECASE,
)


class EmbeddingCache:
    """A SQLite file of vectors by text; several processes can use it at once.

    Args:
        file: Made, with its folder, when the first vectors are written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self, texts: Sequence[str]) -> dict[str, FloatArray]:
        """Those that are kept, by text; none from a file that is damaged, which is written anew."""
        if not self.file.exists():
            return {}
        keys = {_key(text): text for text in texts}
        try:
            with closing(self._connect()) as database:
                found = database.execute(
                    "SELECT key, vector FROM vectors WHERE key IN (SELECT value FROM json_each(?))",
                    [json.dumps([*keys])],
                ).fetchall()
        except sqlite3.DatabaseError as error:
            if "no such table" in str(error):  # another process is about to make it
                return {}
            if not isinstance(error, sqlite3.OperationalError):
                with suppress(OSError):
                    self.file.unlink()
                return {}
            raise self._unwritable(error) from error
        whole = [(key, vector) for key, vector in found if len(vector) % 4 == 0]  # bytes of a float32
        vectors = {keys[key]: np.frombuffer(vector, dtype=np.float32) for key, vector in whole}
        return {text: vector for text, vector in vectors.items() if len(vector) and np.isfinite(vector).all()}

    def write(self, texts: Sequence[str], vectors: FloatArray, *, replace: bool = True) -> None:
        """Keep vectors; those that are NaN or infinite are not.

        Args:
            texts: Whose they are.
            vectors: [texts, dimensions].
            replace: Whether what is there already gives way.

        Raises:
            OutputDirectoryError: The file cannot be written.
        """
        rows = [(_key(t), v.tobytes()) for t, v in zip(texts, vectors, strict=True) if np.isfinite(v).all()]
        with self._writing() as database:
            database.execute("CREATE TABLE IF NOT EXISTS vectors (key TEXT PRIMARY KEY, vector BLOB) WITHOUT ROWID")
            database.executemany(f"INSERT OR {'REPLACE' if replace else 'IGNORE'} INTO vectors VALUES (?, ?)", rows)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as database, database:
                yield database
        except (OSError, sqlite3.Error) as error:
            raise self._unwritable(error) from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file, timeout=_PATIENCE)

    def _unwritable(self, error: Exception) -> OutputDirectoryError:
        return OutputDirectoryError(
            f"a cache folder {str(self.file.parent)!r} that cannot be used ({error})",
            "a folder with room for the vectors",
            "Pass another cache_folder, or none.",
        )


def identity(embed_model: BaseEmbedding) -> tuple[str, bool]:
    """Letters and digits that stand for an embedding model, and whether they stand for all that decides its vectors.

    A `LoraEmbedding`'s fingerprint does. Of others it is a digest of class and settings, without keys and whatever only
    concerns speed, and of names, sizes and times of the files where `model_name` is a model's folder. What a model
    keeps to itself is not in it.
    """
    from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

    if isinstance(embed_model, LoraEmbedding):
        return str(embed_model.fingerprint), True
    kind = type(embed_model)
    settings = {k: v for k, v in embed_model.to_dict().items() if not _NOT_IDENTITY.search(k)}
    told = [kind.__module__, kind.__qualname__, settings, _files(embed_model.model_name)]
    text = json.dumps(told, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40], False


def _files(model_name: Any) -> list[Any]:
    try:
        folder = Path(str(model_name))
        if not any((folder / name).is_file() for name in ("config.json", "modules.json", "adapter_config.json")):
            return []
        stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    except (OSError, ValueError):  # no name that a path could have
        return []
    return [[str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
