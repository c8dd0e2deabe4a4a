"""Ctrl-C and SIGTERM while training: finish the step, save a checkpoint, then stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from llama_index_lora_embed.training import distributed

logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EvaluationStoppedError(BaseException):
    """Leaves an evaluation that a signal interrupts; no `Exception`, so that nobody catches it by chance."""


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one acts as it would have without this.

    Use it as a context manager, in the main thread; elsewhere Python delivers no signals, and it does nothing. A
    signal that was ignored before (nohup) stays ignored.

    Attributes:
        signal: What arrived; None as long as nothing did.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._interruptible = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # impatient: no more waiting
            self.__exit__()
            signal.raise_signal(number)
            return
        self.signal = signal.Signals(number)
        logger.warning("%s: saving a checkpoint after this step; once more stops at once", self.signal.name)
        if self._interruptible:
            raise EvaluationStoppedError

    def asked(self) -> bool:
        """Whether any of the processes that train together was asked to stop; all must call it, and all hear of it."""
        number = distributed.highest(self.signal or 0)
        if number and self.signal is None:
            self.signal = signal.Signals(number)
        return bool(number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it a signal raises `EvaluationStoppedError`: what was going on will be done again after a resume."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def act(self) -> None:
        """Do now what the signal would have done; call it after `__exit__`.

        Raises:
            KeyboardInterrupt: On SIGINT.
            SystemExit: On SIGTERM, where the program has a handler of its own that returned.
        """
        if self.signal is None:
            return
        signal.raise_signal(self.signal)
        if self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
