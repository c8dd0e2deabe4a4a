"""The journal: every answer of an LLM is on disk before it counts, so that nothing is paid for twice.

A text file, not a SQLite database: a torn end or a damaged block costs the lines that it hits, where SQLite refuses the
whole file as malformed (tried with truncated files and a zeroed block); and it can be searched and copied while in use.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Protocol

from filelock import FileLock, Timeout

from llama_index_lora_embed.core.errors import JournalError, JournalInUseError
from llama_index_lora_embed.core.files import whole_file

logger = logging.getLogger(__name__)
_FORMAT = "llama-index-lora-embed journal"
_VERSION = 1


class Answers(Protocol):
    """What requests need of a journal: that of this process, or one that another process has open."""

    def __contains__(self, key: str) -> bool:
        """Whether there is a usable answer under this key."""
        ...

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of the usable answer under a key, or None."""
        ...

    def unusable_answers(self, key: str) -> int:
        """The number of answers under this key with nothing usable in them."""
        ...

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records and wait until they are on disk."""
        ...

    def __enter__(self) -> Answers: ...

    def __exit__(self, *_: object) -> None: ...


class Journal:
    """An append-only file of answers, one JSON object per line, found again by key.

    A record has `key`, `ok` (False for an answer with nothing usable in it), `answer`, and whatever else is to be kept.
    Of several usable answers under one key the first counts.

    Where the answer of each key stands in the file is kept in a temporary database on disk, built in one pass when the
    journal is opened: memory does not grow with the journal, and appending takes the same time at any length.

    Only one process at a time can open a journal. It holds a lock on `<path>.lock`, which the system releases when the
    process ends, however it ends.

    The file is created with its folder if missing. A last line that a killed run left unfinished is moved to
    `<path>.torn`; other lines that are not records are skipped and counted in `unreadable`.

    Raises:
        JournalInUseError: Another run has it open.
        JournalError: The file is of another format or version, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(os.path.expanduser(path)))  # a link to a file shares the file's lock
        self.unreadable = 0
        self._write_lock = threading.Lock()
        self._index_lock = threading.Lock()  # separate, so that look-ups do not wait for the disk
        with contextlib.ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # not bound to a thread, because another thread may close the journal
                stack.enter_context(FileLock(f"{self.path}.lock", timeout=0, thread_local=False))
                self._open(stack)
            except (Timeout, RuntimeError) as error:  # RuntimeError: another journal of this thread holds the lock
                raise JournalInUseError(
                    f"journal {str(self.path)!r}, which another run has open",
                    "one run at a time on one journal",
                    "Wait for the other run, or pass another journal to this one.",
                ) from error
            except OSError as error:
                raise self._unwritable(error) from error
            self._opened = stack.pop_all()

    def _open(self, stack: contextlib.ExitStack) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            with whole_file(self.path) as file:
                file.write(json.dumps({"format": _FORMAT, "version": _VERSION}) + "\n")
        with open(self.path, "rb") as file:
            header = file.readline(1000)
            self._check_header(_parse(header) or {})
            self._writer: IO[bytes] = stack.enter_context(open(self.path, "r+b", buffering=0))  # noqa: SIM115
            # an empty name makes a private database in a temporary file, which is removed when it is closed
            self._index = stack.enter_context(contextlib.closing(sqlite3.connect("", check_same_thread=False)))
            self._index.execute("PRAGMA journal_mode = OFF")
            self._index.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, offset INTEGER, unusable INTEGER)")
            self._end = len(header)
            for line in file:
                if not line.endswith(b"\n"):
                    self._repair_last_line(line)
                    break
                self._add_to_index(_record(line), self._end)
                self._end += len(line)
        if self.unreadable:
            logger.warning("%d line(s) of %s are not records and were skipped", self.unreadable, self.path)

    def _check_header(self, header: dict[str, Any]) -> None:
        if header.get("format") != _FORMAT or header.get("version") != _VERSION:
            got = f"version {header.get('version')!r}" if header.get("format") == _FORMAT else "another format"
            raise JournalError(
                f"{str(self.path)!r}, which is of {got}",
                f"a journal of version {_VERSION}",
                "Name a new file as the journal; this one was left as it is.",
            )

    def _repair_last_line(self, line: bytes) -> None:
        """Complete a line that lacks only its end; move what a killed run left of another one out of the file."""
        if (record := _record(line)) is not None:
            self._write(b"\n", self._end + len(line))
            self._add_to_index(record, self._end)
            self._end += len(line) + 1
            return
        with open(f"{self.path}.torn", "ab") as file:
            file.write(line + b"\n")
        self._writer.truncate(self._end)
        logger.warning("the last line of %s is incomplete; it was moved to %s.torn", self.path, self.path)

    def _add_to_index(self, record: dict[str, Any] | None, offset: int) -> None:
        if record is None:
            self.unreadable += 1
            return
        row = (record["key"], offset, 0) if record.get("ok") else (record["key"], None, 1)
        self._index.execute(
            "INSERT INTO answers VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
            "offset = coalesce(offset, excluded.offset), unusable = unusable + excluded.unusable",
            row,
        )

    def _look_up(self, key: str) -> tuple[int | None, int]:
        """Where the first usable answer stands, and the number of unusable ones."""
        with self._index_lock:
            row = self._index.execute("SELECT offset, unusable FROM answers WHERE key = ?", (key,)).fetchone()
        return row or (None, 0)

    def __contains__(self, key: str) -> bool:
        """Whether there is a usable answer under this key."""
        return self._look_up(key)[0] is not None

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of the usable answer under a key, or None."""
        if (offset := self._look_up(key)[0]) is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(offset)
            return _record(file.readline())

    def unusable_answers(self, key: str) -> int:
        """The number of answers under this key with nothing usable in them, over all runs."""
        return self._look_up(key)[1]

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records and wait until they are on disk.

        Raises:
            JournalError: They could not be written (for example because the disk is full); earlier records are intact.
        """
        records = list(records)
        lines = [(json.dumps(record, ensure_ascii=True) + "\n").encode() for record in records]
        with self._write_lock:
            self._write(b"".join(lines), self._end)
            *offsets, self._end = accumulate(map(len, lines), initial=self._end)
            try:
                with self._index_lock:
                    for record, offset in zip(records, offsets, strict=True):
                        self._add_to_index(record, offset)
            except sqlite3.Error as error:
                raise self._unwritable(error) from error

    def _write(self, data: bytes, offset: int) -> None:
        """Write at the end of the file and wait for the disk; a failed write leaves nothing behind."""
        try:
            self._writer.seek(offset)
            rest = memoryview(data)
            while rest:
                rest = rest[self._writer.write(rest) :]
            os.fsync(self._writer.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # the next write starts at the same offset
                self._writer.truncate(offset)
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the file and release the lock."""
        with self._write_lock, self._index_lock:
            self._opened.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unwritable(self, error: Exception) -> JournalError:
        return JournalError(
            f"journal {str(self.path)!r}, which cannot be written: {error}",
            "a writable file and free disk space",
            "No earlier answer is lost: make room or change the permissions and start again, or name another file.",
        )


def _parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line, or None."""
    value = _parse(line)
    return value if value is not None and isinstance(value.get("key"), str) else None
