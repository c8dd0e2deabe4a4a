"""How sure a difference is: paired bootstrap and sign test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_AT_ONCE = 100  # resamples; bounds the memory at 100 x queries numbers

Numbers = NDArray[np.float64]


def paired_intervals(differences: Numbers, *, seed: int = 0) -> list[tuple[float, float]]:
    """95 % interval of the mean of each column.

    A paired bootstrap over the rows: percentiles of the mean over 2,000 resamples (Efron and Tibshirani, 1993, chapter
    13; for retrieval Sakai, 2006). All columns are resampled together.

    Args:
        differences: [queries, measures].
        seed: Of the resamples.
    """
    rng = np.random.default_rng(seed)
    count = len(differences)
    found = []
    for start in range(0, RESAMPLES, _AT_ONCE):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(_AT_ONCE, RESAMPLES - start))
        found.append(drawn @ differences / count)
    return [interval(column) for column in np.concatenate(found).T]


def interval(values: Sequence[float] | Numbers) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = (float(np.percentile(values, q)) for q in (2.5, 97.5))
    return low, high


def sign_test(won: int, lost: int) -> float:
    """Two-sided p-value of so many wins and losses if both were equally likely; ties count for neither.

    SciPy's exact binomial test (Conover, 1999, section 3.4).
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
