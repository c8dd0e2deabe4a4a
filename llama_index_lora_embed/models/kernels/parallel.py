"""Several forward passes at once on a processor, each on cores of its own, in the place of one on all cores.

The cores that share a pass wait for the slowest of them after each of its hundreds of operations. With a pass each
they never wait, which is measured in benchmarks/README.md.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_MOST = 8  # of a pass, Python's part of some milliseconds is computed by one thread at a time
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by threads and cores of each; they stay
_STARTING = threading.Lock()


class Passes:
    """Passes that were asked for, computed at once where there are threads for it, else when they are added."""

    def __init__(self, pool: ThreadPoolExecutor | None = None, threads: int = 1) -> None:
        self._pool = pool
        self._threads = threads
        self._pending: deque[Future[Tensor]] = deque()
        self._made: list[Tensor] = []

    def add(self, compute: Callable[[], Tensor], *, alone: bool = False) -> None:
        """Compute it, or have it computed, once no more than one pass is waiting for a thread.

        Args:
            compute: In `torch.inference_mode` by itself, which is a thread's own.
            alone: When the others are done, in the calling thread, on all cores.

        Raises:
            Exception: What this pass raised, or one before it.
        """
        if self._pool is not None and not alone:
            try:
                self._pending.append(self._pool.submit(compute))
            except RuntimeError:  # the main thread has ended, after which no pool takes anything
                self._pool = None
            else:
                if len(self._pending) > self._threads:  # what waits takes memory
                    self._made.append(self._pending.popleft().result())
                return
        self.results()
        self._made.append(compute())

    def results(self) -> list[Tensor]:
        """Of all passes, in the order in which they were added."""
        while self._pending:
            self._made.append(self._pending.popleft().result())
        return self._made

    def end(self) -> None:
        """Return when nothing is computed any more."""
        for each in self._pending:
            each.cancel()
        wait(self._pending)


def passes_of(device: torch.device, modules: Iterable[nn.Module]) -> int:
    """How many passes of a model can be computed at once: a processor's threads, at most eight, else 1.

    It is 1 within an autocast, which is the calling thread's own, and for models that change themselves in a pass.
    `torch.set_num_threads(1)` before has all passes computed in the calling thread.
    """
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or any(_changes(module) for module in modules):
        return 1
    return min(_MOST, torch.get_num_threads())


def _changes(module: nn.Module) -> bool:
    """Whether a pass changes what another computes with: BigBird's attention, RoPE that grows, code we do not know."""
    kind, rope = type(module), str(getattr(module, "rope_type", ""))
    known = not kind.__module__.startswith("transformers_modules")
    return not known or kind.__name__ == "BigBirdModel" or "dynamic" in rope or "longrope" in rope


@contextmanager
def parallel_passes(threads: int) -> Iterator[Passes]:
    """Passes that so many threads compute, which share torch's threads out; for one, it is the calling thread.

    Args:
        threads: See `passes_of`. Where the system gives no more threads, it is one.
    """
    passes = Passes(_pool(threads, torch.get_num_threads() // threads) if threads > 1 else None, threads)
    try:
        yield passes
    finally:
        passes.end()


def _pool(threads: int, cores_each: int) -> ThreadPoolExecutor | None:
    with _STARTING:
        pool = _POOLS.get((threads, cores_each))
        if pool is None:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="embed")
            if not _started(pool, threads, cores_each):
                pool.shutdown()
                return None
            _POOLS[threads, cores_each] = pool
        return pool


def _started(pool: ThreadPoolExecutor, threads: int, cores_each: int) -> bool:
    """Whether all threads run, each set to so many cores.

    torch keeps a number for each thread, and a general one that a thread takes at its first operation. Setting the one
    sets the other, so that a thread of our own puts the general number back, at once.
    """
    together = threading.Barrier(threads + 1)

    def set_cores() -> None:
        try:
            torch.get_num_threads()  # takes the general number, which the first operation would do later
            together.wait()
            torch.set_num_threads(cores_each)
            together.wait()
        except BaseException:
            together.abort()
            raise

    def put_back() -> None:
        general = torch.get_num_threads()
        try:
            together.wait()
            together.wait()
        except threading.BrokenBarrierError:
            pass
        finally:
            torch.set_num_threads(general)

    keeper = threading.Thread(target=put_back)
    try:
        keeper.start()
        for _ in range(threads):  # each waits for all others, so that each is a thread of its own
            pool.submit(set_cores)
    except BaseException as error:
        together.abort()
        if isinstance(error, RuntimeError):  # no more threads, of this process or of the system
            return False
        raise
    keeper.join()
    return not together.broken


def _forget() -> None:
    """A process that was forked has none of these threads."""
    global _STARTING
    _STARTING = threading.Lock()
    _POOLS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
