"""Asynchronous work from synchronous code, in notebooks too."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar, cast

from llama_index_lora_embed.core.errors import ConfigError

_T = TypeVar("_T")
_LOCK = threading.Lock()
# by process, because threads do not survive a fork
_RUNNING: dict[int, tuple[asyncio.AbstractEventLoop, threading.Thread]] = {}


def run_in_loop(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end in the process's own loop for this, whether or not another one is running.

    It is always the same loop, because the clients of API models belong to the one that they were first used in. Ctrl-C
    and a notebook's stop button cancel the work.
    """
    loop = _loop()
    with suppress(RuntimeError):  # no loop is running here
        if asyncio.get_running_loop() is loop:
            work.close()
            raise ConfigError(
                "an evaluation that is started from within another one's requests",
                "one at a time",
                "Await aevaluate_retrieval there.",
            )
    future = asyncio.run_coroutine_threadsafe(_guarded(work), loop)
    try:
        result, stop = future.result()
    except BaseException:
        future.cancel()
        raise
    if stop is not None:
        raise stop
    return cast(_T, result)


async def _guarded(work: Coroutine[Any, Any, _T]) -> tuple[_T | None, BaseException | None]:
    """What would end the loop's thread is handed to whoever waits."""
    try:
        return await work, None
    except (KeyboardInterrupt, SystemExit) as stop:
        return None, stop


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
        known = _RUNNING.get(os.getpid())
        if known is None or not known[1].is_alive():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="lora-embed-evaluation", daemon=True)
            known = _RUNNING[os.getpid()] = loop, thread
            thread.start()
        return known[0]


def run_sync(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, in a notebook's running loop too (there in a thread of its own)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: Future[_T] = Future()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[_T]]] = Future()
    context = contextvars.copy_context()

    async def main() -> _T:
        task = asyncio.ensure_future(work)
        started.set_result((asyncio.get_running_loop(), task))
        return await task

    def target() -> None:
        try:
            outcome.set_result(context.run(asyncio.run, main()))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=target, name="asking", daemon=True).start()
    try:
        return outcome.result()
    except KeyboardInterrupt:  # the notebook's stop button: end the other thread's work, keep what it has
        loop, task = started.result()
        loop.call_soon_threadsafe(task.cancel)
        wait([outcome])
        raise
