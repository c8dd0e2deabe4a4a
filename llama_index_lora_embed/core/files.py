"""Atomic files and directories: a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_STALE_SECONDS = 3600


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file (mode "w" for UTF-8, or "wb") that replaces `path` when the block ends without an error.

    Raises:
        OSError: The disk is full or not writable; the old file is unchanged.
    """
    target = Path(path)
    handle, staging = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(staging, 0o666 & ~umask)  # mkstemp's 0600 would lock out other users
        os.replace(staging, target)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON, atomically; missing folders are created. Raises `OSError` as `whole_file` does."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        json.dump(value, file, indent=4)


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line; a line that a killed process cut short is skipped."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def append_json_line(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Append a JSON object as a line and sync it; a last line that was cut short is ended first."""
    with open(path, "a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(value).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def model_place(place: str | os.PathLike[str]) -> str:
    """A model's folder or Hub id as text, without the "local:" that LlamaIndex's `resolve_embed_model` takes."""
    return os.fspath(place).removeprefix("local:")


def absolute(path: str | os.PathLike[str]) -> str:
    """A folder's absolute path, so that a changed working directory changes nothing; a Hub id as it is."""
    text = os.path.expanduser(model_place(path))
    return os.path.abspath(text) if os.path.exists(text) else text


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def staging_beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the target's file system, removed at the end if it still exists.

    Folders of killed runs are removed once they are an hour old; no write takes that long.
    """
    for stale in target.parent.glob(f".{glob.escape(target.name)}.staging-*"):
        with suppress(OSError):  # another process may be removing it too
            if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.staging-"))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_directory(staging: Path, target: Path) -> None:
    """Sync `staging` and move it to `target`; the old directory is kept as `<name>.previous`."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [*staging.rglob("*"), staging]:
        # mkdtemp's 0700 and safetensors' 0600 would lock out the user who serves the model
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)
        _sync(path)
    previous = target.with_name(target.name + ".previous")
    if target.exists() and any(target.iterdir()):
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(target, previous)
    try:
        os.rename(staging, target)
    except OSError:
        if previous.exists() and not target.exists():
            os.rename(previous, target)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    if os.name == "nt":  # Windows cannot sync directories or files opened for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
