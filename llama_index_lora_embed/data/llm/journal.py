"""The journal: every answer of an LLM on disk before it counts, so that nothing is paid for twice."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from llama_index_lora_embed.core.errors import JournalError, JournalInUseError

logger = logging.getLogger(__name__)
_FORMAT = "llama-index-lora-embed journal"
_VERSION = 1
_HEADER = json.dumps({"format": _FORMAT, "version": _VERSION}) + "\n"


class Journal:
    r"""An append-only file of answers, one JSON object a line, found again by key.

    The file is the truth. Where each key's answer stands in it is looked up in a temporary database on disk,
    built in one pass when the journal is opened, so that memory does not grow with the journal. Appending
    costs the same however long the file is.

    A record has `key`, `ok` (False: answered, but with nothing usable in it), `answer`, and whatever else is to
    be kept. Of several usable answers under one key the first counts.

    One process at a time may have a journal open; a lock beside the file (`<path>.lock`) sees to that, and goes
    with its process however that ends.

    Args:
        path: The file; made with its folder if it is not there. A last line that a killed run left unfinished is
            moved to `<path>.torn`; other lines that are no records are passed over and counted.

    Attributes:
        unreadable: Lines passed over.

    Raises:
        JournalInUseError: Another run has it open.
        JournalError: The file is of another format or version, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(os.path.expanduser(path)))  # one lock for one file, also through a link
        self.unreadable = 0
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()  # of its own, so that looking up does not wait for the disk
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # not bound to one thread: it may be closed by another than opened it
            self._lock = FileLock(f"{self.path}.lock", timeout=0, thread_local=False)
            self._lock.acquire()
        except (Timeout, RuntimeError) as error:  # RuntimeError: another journal of this very thread has it
            raise JournalInUseError(
                f"journal {str(self.path)!r}, which another run has open",
                "one run at a time on one journal",
                "Wait for the other run, or give this one a journal of its own.",
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        try:
            if not self.path.exists() or self.path.stat().st_size == 0:
                self._create()
            self._check_header()
            self._file: IO[bytes] = open(self.path, "r+b")  # noqa: SIM115  # closed by close()
            self._reader: IO[bytes] = open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error) from error
        # an empty name is a private database in a temporary file, gone when it is closed
        self._index = sqlite3.connect("", check_same_thread=False)
        self._index.execute("PRAGMA journal_mode = OFF")
        self._index.execute("CREATE TABLE answered (key TEXT PRIMARY KEY, place INTEGER) WITHOUT ROWID")
        self._index.execute("CREATE TABLE refused (key TEXT PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        self._end = len(self._file.readline())
        for line in iter(self._file.readline, b""):
            if not line.endswith(b"\n"):
                self._mend_tail(line, self._end)
                break
            self._note(_record(line), self._end)
            self._end += len(line)
        if self.unreadable:
            logger.warning("%d line(s) of %s are no records and were passed over", self.unreadable, self.path)

    def _create(self) -> None:
        handle, staging = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(_HEADER)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, self.path)

    def _check_header(self) -> None:
        with open(self.path, "rb") as file:
            header = file.readline(1000)
        found = _record(header, key=None)
        if found is None or found.get("format") != _FORMAT or found.get("version") != _VERSION:
            told = f"version {found.get('version')!r}" if found and found.get("format") == _FORMAT else "another format"
            raise JournalError(
                f"{str(self.path)!r}, which is of {told}",
                f"a journal of version {_VERSION}",
                "Name a new file as the journal; this one was left as it is.",
            )

    def _mend_tail(self, torn: bytes, place: int) -> None:
        """Make the file end with a whole line; what a killed run left of the last one is put aside."""
        if (record := _record(torn)) is not None:  # all there but the line's end
            self._file.seek(place + len(torn))
            self._file.write(b"\n")
            self._note(record, place)
            self._end = place + len(torn) + 1
            return
        with open(f"{self.path}.torn", "ab") as aside:
            aside.write(torn + b"\n")
        self._file.truncate(place)
        logger.warning("%s ended within a line; the piece was moved to %s.torn", self.path, self.path)

    def _note(self, record: dict[str, Any] | None, place: int) -> None:
        if record is None:
            self.unreadable += 1
        elif record.get("ok"):
            self._index.execute("INSERT OR IGNORE INTO answered VALUES (?, ?)", (record["key"], place))
        else:
            self._index.execute(
                "INSERT INTO refused VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET times = times + 1", (record["key"],)
            )

    def __contains__(self, key: str) -> bool:
        """Whether a usable answer is under this key."""
        return self._look_up("SELECT place FROM answered WHERE key = ?", key) is not None

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of the usable answer under a key, or None."""
        if (place := self._look_up("SELECT place FROM answered WHERE key = ?", key)) is None:
            return None
        with self._read_lock:
            self._reader.seek(place)
            return _record(self._reader.readline())

    def refusals(self, key: str) -> int:
        """How many answers with nothing usable in them this key has had, in all runs."""
        return self._look_up("SELECT times FROM refused WHERE key = ?", key) or 0

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records and wait until the disk has them.

        Raises:
            JournalError: They could not be written (disk full, say); what was there before is whole.
        """
        records = list(records)
        lines = [(json.dumps(record, ensure_ascii=True) + "\n").encode() for record in records]
        with self._write_lock:
            try:
                self._file.seek(self._end)
                self._file.writelines(lines)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                self._take_back()
                raise self._unwritable(error) from error
            places = [self._end + sum(map(len, lines[:number])) for number in range(len(lines))]
            self._end += sum(map(len, lines))
            try:
                with self._read_lock:
                    for record, place in zip(records, places, strict=True):
                        self._note(record, place)
            except sqlite3.Error as error:
                raise self._unwritable(error) from error

    def _take_back(self) -> None:
        """Drop what a failed write left, in the file and in Python's buffer of it."""
        with contextlib.suppress(OSError):
            self._file.close()  # tries to flush the rest, in vain
        with contextlib.suppress(OSError):
            os.truncate(self.path, self._end)
        self._file = open(self.path, "r+b")  # noqa: SIM115

    def close(self) -> None:
        """Close the file and let other processes have it."""
        with self._write_lock, self._read_lock:
            self._index.close()
            self._reader.close()
            self._file.close()
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All readable records, in the order in which they were written."""
        with open(self.path, "rb") as file:
            file.readline()
            yield from (record for line in file if (record := _record(line)) is not None)

    def _look_up(self, question: str, key: str) -> int | None:
        with self._read_lock:
            row = self._index.execute(question, (key,)).fetchone()
        return int(row[0]) if row else None

    def _unwritable(self, error: Exception) -> JournalError:
        return JournalError(
            f"journal {str(self.path)!r}, which cannot be written: {error}",
            "a file that can be written, and room on its disk",
            "Nothing that was written is lost: make room or permissions and start again, or name another file.",
        )


def _record(line: bytes, key: str | None = "key") -> dict[str, Any] | None:
    """The object in a line, or None where it holds none (with that key, if one is asked for)."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (key is not None and not isinstance(value.get(key), str)):
        return None
    return value
