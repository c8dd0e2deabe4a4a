"""Signals during training: Ctrl-C and SIGTERM finish the step, save a checkpoint, and then stop."""

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
    """Ends an evaluation that a signal interrupts; a `BaseException`, so that no handler of errors catches it."""


class StopRequest:
    """Context that records the first SIGINT or SIGTERM; a second one has its usual effect.

    Outside the main thread, to which Python delivers no signals, it does nothing. A signal that was ignored before
    (nohup) stays ignored.

    Attributes:
        signal: The signal that arrived, or None.
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
                    signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # the second one
            self.__exit__()
            try:
                signal.raise_signal(number)
            finally:
                if self.signal != number:  # who sent the first one still waits for its effect
                    signal.raise_signal(self.signal)
            return
        self.signal = signal.Signals(number)
        logger.warning(
            "%s: training stops after this step and saves a checkpoint; a second signal stops at once", self.signal.name
        )
        if self._interruptible:
            raise EvaluationStoppedError

    def requested(self) -> bool:
        """Whether any process got a signal; all processes must call this, and all get the same answer."""
        number = distributed.highest(self.signal or 0)
        if number and self.signal is None:
            self.signal = signal.Signals(number)
        return bool(number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it a signal raises `EvaluationStoppedError`; a resumed run evaluates again."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def deliver(self) -> None:
        """Send the recorded signal again, now with its usual effect; call it after `__exit__`.

        Raises:
            KeyboardInterrupt: On SIGINT.
            SystemExit: On SIGTERM, if the program has a handler of its own, which returned.
        """
        if self.signal is None:
            return
        signal.raise_signal(self.signal)
        if self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
