"""Several forward passes at once on a processor, each on a core of its own, in the place of one on all cores.

The cores that share a pass wait for the slowest of them after each of its hundreds of operations. With a pass each
they never wait, which is measured in benchmarks/README.md.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

_SETTING = threading.Lock()
_MOST = 8  # of a pass, Python's part of some milliseconds is computed by one thread at a time


class Passes:
    """Passes that were asked for, computed at once where there are threads for it, else when they are added."""

    def __init__(self, pool: ThreadPoolExecutor | None = None, threads: int = 1) -> None:
        self._pool = pool
        self._threads = threads
        self._pending: deque[Future[Tensor]] = deque()
        self._made: list[Tensor] = []

    def add(self, compute: Callable[[], Tensor]) -> None:
        """Compute it, or wait until one thread at most has nothing to do after the pass that it computes.

        Raises:
            Exception: What this pass raised, or one before it.
        """
        if self._pool is None:
            self._made.append(compute())
            return
        self._pending.append(self._pool.submit(compute))
        if len(self._pending) > self._threads:  # what waits takes memory
            self._made.append(self._pending.popleft().result())

    def results(self) -> list[Tensor]:
        """Of all passes, in the order in which they were added."""
        while self._pending:
            self._made.append(self._pending.popleft().result())
        return self._made


def cores(device: torch.device) -> int:
    """How many passes can be computed at once: torch's threads on a processor, 1 on an accelerator or in autocast.

    At most eight. `torch.set_num_threads(1)` before has all passes computed in the calling thread.
    """
    if device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return 1
    return min(_MOST, torch.get_num_threads())


@contextmanager
def passes_at_once(threads: int, cores_each: int = 1) -> Iterator[Passes]:
    """Passes that so many threads compute, each on so many cores; for one thread, it is the calling one, unchanged.

    Gradients are off in those threads (`torch.inference_mode`); other settings of the calling thread, as autocast, do
    not reach them.

    Args:
        threads: That compute passes at once. Where the system gives no more threads, it is one.
        cores_each: Of torch's threads, those that share a pass.
    """
    if threads == 1:
        yield Passes()
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="embed")
    try:
        yield Passes(pool, threads) if _started(pool, threads, cores_each) else Passes()
    finally:
        pool.shutdown(cancel_futures=True)


def _started(pool: ThreadPoolExecutor, threads: int, cores_each: int) -> bool:
    """Whether all threads run, each set to so many cores: torch's setting is that of the thread which makes it."""
    together = threading.Barrier(threads + 1)

    def set_cores() -> None:
        try:
            torch.get_num_threads()  # has this thread take the general setting, as its first operation would do later
            torch.set_num_threads(cores_each)
            together.wait()
        except BaseException:
            together.abort()
            raise

    with _SETTING:
        before = torch.get_num_threads()
        try:
            for _ in range(threads):  # each waits for all others, so that each is a thread of its own
                pool.submit(set_cores)
            together.wait()
        except RuntimeError:  # no more threads, of this process or of the system
            together.abort()
            return False
        finally:
            torch.set_num_threads(before)  # which is what threads that start later take, too
    return True
