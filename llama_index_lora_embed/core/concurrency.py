"""Asynchronous work from synchronous code, in scripts and in notebooks.

LlamaIndex's `asyncio_run` is not used: where a loop is running, an interrupt waits for all of the work instead of
cancelling it, and each call has a loop of its own, which breaks API clients that are bound to an earlier one. Its
`run_jobs` leaves the other jobs running when one fails.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from llama_index_lora_embed.core.errors import ConfigError

_T = TypeVar("_T")
_LOCK = threading.Lock()
_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}  # by process id, because threads do not survive a fork


def run_async(work: Coroutine[Any, Any, _T], *, suspends: bool = True) -> _T:
    """Run a coroutine to its end, whether or not an event loop is running in the calling thread.

    All coroutines of a process run in one event loop in a background thread, because the clients of API models are
    bound to the loop in which they were first used. They see the caller's context variables. Ctrl-C and a notebook's
    stop button cancel the work; the interrupt is raised once the work has cleaned up.

    Args:
        work: The coroutine.
        suspends: False for a coroutine that never has to wait for anything. It then runs in the calling thread.

    Raises:
        ConfigError: The caller runs in the background loop itself, which would wait for itself forever.
    """
    if not suspends:
        try:
            work.send(None)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        work.close()
        raise AssertionError("the coroutine suspended")
    loop = _background_loop()
    with suppress(RuntimeError):  # no loop is running in this thread
        if asyncio.get_running_loop() is loop:
            work.close()
            raise ConfigError(
                "a synchronous call from within asynchronous work of this package",
                "an asynchronous call",
                "Await aevaluate_retrieval, agenerate or agenerate_qa_embedding_pairs there.",
            )
    started: Future[asyncio.Task[_T] | None] = Future()

    async def main() -> _T:
        started.set_result(asyncio.current_task())
        return await work

    outcome = asyncio.run_coroutine_threadsafe(main(), loop)
    try:
        while not wait([outcome], timeout=1).done:  # Windows cannot interrupt a wait without a timeout
            pass
    except BaseException:
        if (task := started.result()) is not None:
            loop.call_soon_threadsafe(task.cancel)
        wait([outcome])
        raise
    return outcome.result()


def _background_loop() -> asyncio.AbstractEventLoop:
    with _LOCK:
        loop = _LOOPS.get(os.getpid())
        if loop is None:
            loop = _LOOPS[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(loop,), name="llama-index-lora-embed", daemon=True).start()
        return loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        with suppress(KeyboardInterrupt, SystemExit):  # raised by a task; asyncio hands it to the waiting caller too
            loop.run_forever()
