"""How sure a difference is: paired bootstrap and sign test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
FEWEST = 10
"""Queries below which there is no verdict: of so few, one or two decide."""

_AT_ONCE = 100  # resamples; bounds the memory at 100 x queries numbers

Numbers = NDArray[np.float64]


def paired_intervals(differences: Numbers, *, seed: int = 0) -> list[tuple[float, float]]:
    """95 % interval of the mean of each column.

    A paired bootstrap over the rows: percentiles of the mean over 2,000 resamples (Efron and Tibshirani, 1993, chapter
    13; for retrieval Sakai, 2006). Resamples of few rows are too narrow, so that percentiles further out are taken, as
    far as Student's t lies beyond the normal distribution (Hesterberg 2015, arXiv 1411.5279, section 3.2). All columns
    are resampled together. One row says nothing of others: its interval is everything, -1 to 1.

    Args:
        differences: [queries, measures], from -1 to 1.
        seed: Of the resamples.
    """
    from scipy.stats import norm, t  # type: ignore[import-untyped]

    rng = np.random.default_rng(seed)
    count = len(differences)
    if count < 2:
        return [(-1.0, 1.0)] * differences.shape[1]
    found = []
    for start in range(0, RESAMPLES, _AT_ONCE):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(_AT_ONCE, RESAMPLES - start))
        found.append(drawn @ differences / count)
    tail = 100 * float(norm.cdf(np.sqrt(count / (count - 1)) * t.ppf(0.025, count - 1)))
    return [interval(column, tail) for column in np.concatenate(found).T]


def interval(values: Sequence[float] | Numbers, tail: float = 2.5) -> tuple[float, float]:
    """What lies between two percentiles of resampled values: the middle 95 %, unless another tail is given."""
    low, high = (float(np.percentile(values, q)) for q in (tail, 100 - tail))
    return low, high


def sign_test(won: int, lost: int) -> float:
    """Two-sided p-value of so many wins and losses if both were equally likely; ties count for neither.

    SciPy's exact binomial test (Conover, 1999, section 3.4).
    """
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
