"""Asynchronous work from synchronous code, in notebooks too."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")
_LOCK = threading.Lock()
_RUNNING: dict[int, asyncio.AbstractEventLoop] = {}  # by process, because threads do not survive a fork


def run_to_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end in the process's own loop for this, whether or not another one is running.

    It is always the same loop, because the clients of API models belong to the one that they were first used in. Ctrl-C
    and a notebook's stop button cancel the work.
    """
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def run_without_waiting(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine that never waits for anything, outside of any loop."""
    try:
        work.send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    work.close()
    raise AssertionError("it waited for something")


def _loop() -> asyncio.AbstractEventLoop:
    with _LOCK:
        if os.getpid() not in _RUNNING:
            loop = _RUNNING[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="lora-embed-evaluation", daemon=True).start()
        return _RUNNING[os.getpid()]
