"""Statistical significance of a difference: paired bootstrap and sign test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MIN_QUERIES = 10
"""Queries below which there is no verdict, because one or two of them would decide it."""

_RESAMPLES = 2000
_BATCH = 100  # resamples drawn at once; bounds the memory to 100 x queries numbers

Numbers = NDArray[np.float64]


def paired_intervals(differences: Numbers, *, seed: int = 0) -> list[tuple[float, float]]:
    """95 % confidence interval of the mean of each column, by a paired bootstrap over the rows.

    Percentiles of the mean over 2,000 resamples (Efron and Tibshirani 1993, chapter 13; for retrieval Sakai 2006).
    Percentile intervals of few rows are too narrow, so the percentiles are moved outwards by as much as Student's t
    exceeds the normal distribution (Hesterberg 2015, arXiv 1411.5279, section 3.2), which `scipy.stats.bootstrap` does
    not offer. A single row gives the whole range, -1 to 1. `differences` is [queries, metrics], from -1 to 1.
    """
    from scipy.stats import norm, t  # type: ignore[import-untyped]

    rng = np.random.default_rng(seed)
    count = len(differences)
    if count < 2:
        return [(-1.0, 1.0)] * differences.shape[1]
    means = []
    for start in range(0, _RESAMPLES, _BATCH):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=min(_BATCH, _RESAMPLES - start))
        means.append(weights @ differences / count)
    tail = 100 * float(norm.cdf(np.sqrt(count / (count - 1)) * t.ppf(0.025, count - 1)))
    return [percentile_interval(column, tail) for column in np.concatenate(means).T]


def percentile_interval(values: Sequence[float] | Numbers, tail: float = 2.5) -> tuple[float, float]:
    """The percentiles `tail` and 100 - `tail` of resampled values; by default those around the middle 95 %."""
    low, high = (float(np.percentile(values, q)) for q in (tail, 100 - tail))
    return low, high


def sign_test(improved: int, degraded: int) -> float:
    """Two-sided p-value of the sign test; ties are left out (Conover 1999, section 3.4)."""
    from scipy.stats import binomtest

    return float(binomtest(improved, improved + degraded).pvalue) if improved + degraded else 1.0
