"""Time and memory of a part of a benchmark."""

from __future__ import annotations

import threading
import time
from pathlib import Path


class Measured:
    """Seconds by the clock and of the processor, and the most memory held at a time in MB beyond the start."""

    def __enter__(self) -> Measured:
        self.times = time.perf_counter(), time.process_time()
        self.start = self.peak = anonymous_mb()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.peak = max(self.peak, anonymous_mb())

    def __exit__(self, *_: object) -> None:
        by_clock, of_processor = time.perf_counter() - self.times[0], time.process_time() - self.times[1]
        self._over.set()
        self._thread.join()
        mb = max(self.peak, anonymous_mb()) - self.start
        self.figures = {"seconds": by_clock, "processor": of_processor, "mb": mb}


def anonymous_mb() -> float:
    """Megabytes that this process holds beside files that are mapped; on Linux alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
