"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library is glibc.

    glibc keeps it for the thread that freed it, and in pieces: after an evaluation of tenk_train with MiniLM on two
    threads 235 to 500 MB that training on the main thread cannot use, and after a step what the next one, whose texts
    have other lengths, does not fit into.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
