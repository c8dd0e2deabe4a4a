"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


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
