"""Files that are whole or not there."""

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
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write to; a reader sees the old one or, once the block has ended, the new one, never half of it.

    Args:
        path: Its folder is there.
        mode: "w" for text in UTF-8, "wb" for bytes.

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
        os.chmod(staging, 0o666 & ~umask)  # mkstemp's 0600 would surprise whoever shares the file
        os.replace(staging, target)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON; a reader sees the old file or the new one, never half of it.

    Args:
        path: Its folder is made where it is missing.
        value: What `json.dump` takes.

    Raises:
        OSError: The disk is full or not writable; the old file is unchanged.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        json.dump(value, file, indent=4)


_STALE_SECONDS = 3600


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def staging_beside(target: Path) -> Iterator[Path]:
    """A fresh folder on the target's file system, removed at the end if it is still there.

    Folders that a killed run left behind are removed once they are an hour old, which no write takes.
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
    """Sync `staging` and move it to `target`; what was there stays as `<name>.previous`."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [*staging.rglob("*"), staging]:
        # mkdtemp's 0700 and safetensors' 0600 would lock out whoever serves the model
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
    """Have the disk hold a file's content, or a directory's names, before going on."""
    if os.name == "nt":  # Windows syncs neither directories nor files opened for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
