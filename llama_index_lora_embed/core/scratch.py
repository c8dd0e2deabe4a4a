"""Arrays and texts in temporary files, for what does not fit into memory.

The files have no name where the system allows it, so that nothing is left of a process that was killed.
"""

from __future__ import annotations

import math
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from llama_index_lora_embed.core.errors import OutputDirectoryError

Folder = str | os.PathLike[str]


@contextmanager
def _writing(folder: Folder, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputDirectoryError(
            f"{os.fspath(folder)!r}, where a temporary file of {size / 1e6:,.0f} MB cannot be written: {error}",
            "a folder that can be written, with room for it",
            "Free some space, or choose a folder on another disk.",
        ) from error


def scratch_array(shape: tuple[int, ...], dtype: npt.DTypeLike, folder: Folder | None) -> npt.NDArray[Any]:
    """An array of zeros: in memory, or in a temporary file of this folder that is gone when the array is.

    Raises:
        OutputDirectoryError: The folder cannot be written, or has no room.
    """
    if folder is None:
        return np.zeros(shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with _writing(folder, size), tempfile.TemporaryFile(dir=folder) as file:
        _reserve(file, size)
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))  # views of a memmap itself are slow


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the room at once: a disk that is full when a mapped page is written ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()


class ScratchTexts:
    """Texts in a temporary file, by number; 8 bytes of memory each. What UTF-8 cannot write becomes "?".

    All are added before the first is read.

    Args:
        folder: Where the file is. It is gone when this is closed.

    Raises:
        OutputDirectoryError: The folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._ends = array("Q", [0])
        with _writing(folder, 0):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def append(self, text: str) -> None:
        """Add a text, while none has been read."""
        data = text.encode("utf-8", "replace")
        end = self._ends[-1] + len(data)
        with _writing(self._folder, end):
            self._file.write(data)
        self._ends.append(end)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        start, end = self._ends[number], self._ends[number + 1]
        with _writing(self._folder, end):  # what is still in the buffer
            self._file.seek(start)
        return self._file.read(end - start).decode()

    def __enter__(self) -> ScratchTexts:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # what could not be written is still in the buffer
            self._file.close()
