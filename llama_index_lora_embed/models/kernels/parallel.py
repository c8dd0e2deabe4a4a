"""Thread-parallel inference: several forward passes at a time on a CPU, each on threads of its own.

Threads that share a forward pass wait for the slowest of them after each of its hundreds of operations; with a pass
each they never wait. Two processes of one thread embedded 98 nodes a second together where one of two threads embedded
75 (benchmarks/README.md, "Embedding"); threads do as well as processes, because torch releases the GIL, and they need
one copy of the weights. Little text stays in the calling thread. Switch: `torch.set_num_threads(1)`, which has all
passes computed in the calling thread. Delete this module when `python benchmarks/throughput.py` is as fast with one
forward pass on all threads.
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

_MAX_PASSES = 8  # the GIL serialises some milliseconds of each pass
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by passes at a time and torch threads of each
_LOCK = threading.Lock()


class Passes:
    """Forward passes, computed in a pool's threads, or in the calling thread when they are added."""

    def __init__(self, pool: ThreadPoolExecutor | None = None, threads: int = 1) -> None:
        self._pool = pool
        self._threads = threads
        self._pending: deque[Future[Tensor]] = deque()
        self._results: list[Tensor] = []

    def add(self, compute: Callable[[], Tensor], *, alone: bool = False) -> None:
        """Add a pass, and block while more than one pass waits for a thread.

        Args:
            compute: One forward pass. It enters `torch.inference_mode` itself, because that mode is per thread.
            alone: Compute it in the calling thread on all of torch's threads, after the passes before it.

        Raises:
            Exception: The exception of this pass or of one before it.
        """
        if self._pool is not None and not alone:
            try:
                self._pending.append(self._pool.submit(compute))
            except RuntimeError:  # pools accept no work after the main thread has ended
                self._pool = None
            else:
                if len(self._pending) > self._threads:  # waiting inputs take memory
                    self._results.append(self._pending.popleft().result())
                return
        self.results()
        self._results.append(compute())

    def results(self) -> list[Tensor]:
        """Results of all passes, in the order in which they were added."""
        while self._pending:
            self._results.append(self._pending.popleft().result())
        return self._results

    def cancel(self) -> None:
        """Cancel the waiting passes and return when no pass is running any more."""
        for future in self._pending:
            future.cancel()
        wait(self._pending)


def max_parallel_passes(device: torch.device, modules: Iterable[nn.Module]) -> int:
    """Number of forward passes to compute at a time: torch's threads on a CPU, at most eight, else 1.

    It is 1 under autocast, which is per thread, and for models whose forward pass changes the model.
    """
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or any(map(_may_change, modules)):
        return 1
    return min(_MAX_PASSES, torch.get_num_threads())


def _may_change(module: nn.Module) -> bool:
    """Whether a forward pass may change the module: BigBird's attention, RoPE that grows, or remote code."""
    kind, rope = type(module), str(getattr(module, "rope_type", ""))
    remote = kind.__module__.startswith("transformers_modules")
    return remote or kind.__name__ == "BigBirdModel" or "dynamic" in rope or "longrope" in rope


@contextmanager
def parallel_passes(threads: int) -> Iterator[Passes]:
    """Compute passes in `threads` threads, among which torch's threads are divided.

    Args:
        threads: See `max_parallel_passes`. Passes are computed in the calling thread if it is 1, or if the system
            cannot start the threads.
    """
    passes = Passes(_pool(threads, torch.get_num_threads() // threads) if threads > 1 else None, threads)
    try:
        yield passes
    finally:
        passes.cancel()


def _pool(threads: int, threads_each: int) -> ThreadPoolExecutor | None:
    """The pool for these numbers, started once per process; None if its threads cannot be started."""
    with _LOCK:
        pool = _POOLS.get((threads, threads_each))
        if pool is None:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="embed")
            if not _start(pool, threads, threads_each):
                pool.shutdown()
                return None
            _POOLS[threads, threads_each] = pool
        return pool


def _start(pool: ThreadPoolExecutor, threads: int, threads_each: int) -> bool:
    """Start a pool's threads, each with its own number of torch threads, and return whether all of them run.

    torch has a number of threads for each thread, and a process-wide one that a thread copies at its first operation.
    `torch.set_num_threads` sets both, so a helper thread restores the process-wide number right away.
    """
    barrier = threading.Barrier(threads + 1)

    def set_threads() -> None:
        try:
            torch.get_num_threads()  # copies the process-wide number, as the first operation would
            barrier.wait()
            torch.set_num_threads(threads_each)
            barrier.wait()
        except BaseException:
            barrier.abort()
            raise

    def restore_process_wide() -> None:
        process_wide = torch.get_num_threads()
        try:
            barrier.wait()
            barrier.wait()
        except threading.BrokenBarrierError:
            pass
        finally:
            torch.set_num_threads(process_wide)

    restorer = threading.Thread(target=restore_process_wide)
    try:
        restorer.start()
        for _ in range(threads):  # each waits for all others at the barrier, so each starts a new thread
            pool.submit(set_threads)
    except BaseException as error:
        barrier.abort()
        if isinstance(error, RuntimeError):  # the system starts no more threads
            return False
        raise
    restorer.join()
    return not barrier.broken


def _forget_pools() -> None:
    """Drop the pools, whose threads do not exist in a forked process."""
    global _LOCK
    _LOCK = threading.Lock()
    _POOLS.clear()


def _after_fork() -> None:
    """Drop the pools, and compute in the calling thread alone.

    OpenMP (libgomp) would wait forever for the threads of the parent process, which do not exist in a forked one, in
    the first operation that it divides. The workers of torch's DataLoader have one thread for the same reason.
    """
    _forget_pools()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
