"""Compare two evaluations of the same labelled pairs, by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.evaluation.pairs import PairEvaluation
from llama_index_lora_embed.evaluation.significance import Numbers, percentile_interval
from llama_index_lora_embed.evaluation.verdict import Comparison, Evidence, decide

_RESAMPLES = 1000
_MIN_PAIRS = 5  # of each label, or twice as many graded ones; resamples of fewer hardly differ
_ROUNDING = 1e-9  # ranks are multiples of 1/2, so smaller differences are rounding errors

Counts = NDArray[np.int64]


def compare_pairs(base: PairEvaluation, tuned: PairEvaluation, *, seed: int = 0) -> Comparison:
    """Compare two models on the same labelled pairs: by ROC-AUC if the labels are 0 and 1, by Spearman if graded.

    The interval is a paired bootstrap over the pairs (percentiles of the difference over 1,000 resamples; pairs
    labelled 1 and 0 are resampled separately, so that each resample has as many of both). With fewer than five pairs of
    either label, or ten graded ones, the verdict is NO CLEAR DIFFERENCE, whatever the interval.

    Improved and degraded pairs are those that the tuned model ranks better and worse. With labels 0 and 1 a pair is
    ranked better if its placement rises: the share of the pairs with the other label that it is on the right side of
    (DeLong et al. 1988; the mean placement is the ROC-AUC). With grades, if its rank by similarity comes closer to its
    rank by label.

    Raises:
        DatasetError: The two evaluations are of different pairs.
    """
    if base.digest != tuned.digest or len(base.labels) != len(tuned.labels):
        raise DatasetError(
            f"two evaluations of different pairs ({len(base.labels)} and {len(tuned.labels)})",
            "the same pairs in the same order for both",
            "Evaluate both models on one LabelledPairs.",
        )
    rng = np.random.default_rng(seed)
    differences = list(resampled_differences(base.similarities, tuned.similarities, base.labels, base.binary, rng))
    interval = percentile_interval(differences)
    scores = [_pair_scores(evaluation.similarities, base.labels, base.binary) for evaluation in (base, tuned)]
    gains = scores[1] - scores[0]
    counts = ", ".join(f"{count} {kind}" for kind, count in base.origins.items())
    basis = f"They are {counts}."
    enough = min(base.origins.values()) >= _MIN_PAIRS * (1 if base.binary else 2)
    if not enough:
        basis += f" A verdict needs at least {_MIN_PAIRS} pairs of each label, or {2 * _MIN_PAIRS} graded pairs."
    return Comparison(
        decide(interval, enough),
        tuned.metrics[base.metric] - base.metrics[base.metric],
        interval,
        len(base.labels),
        int((gains > _ROUNDING).sum()),
        int((gains < -_ROUNDING).sum()),
        Evidence.PAIRS,
        basis,
        base.metric,
    )


def resampled_differences(
    base: Numbers, tuned: Numbers, labels: Numbers, binary: bool, rng: np.random.Generator
) -> Iterator[float]:
    """Difference in ROC-AUC, or in Spearman's correlation, in each resample; a constant side correlates 0.

    A resample is a count for each pair. Values are sorted once and their ranks follow from the counts; SciPy would sort
    every resample, which takes ten times as long on 20,000 pairs. `base` and `tuned` are similarities, [pairs].
    """
    strata = [np.flatnonzero(labels == 1), np.flatnonzero(labels != 1)] if binary else [np.arange(len(labels))]
    label_ties, *ties = (np.unique(values, return_inverse=True)[1] for values in (labels, base, tuned))
    counts: Counts = np.zeros(len(labels), dtype=np.int64)
    for _ in range(_RESAMPLES):
        for pairs in strata:
            counts[pairs] = np.bincount(rng.integers(len(pairs), size=len(pairs)), minlength=len(pairs))
        ranks = [_ranks(groups, counts) for groups in ties]
        if binary:
            before, after = (_roc_auc(side, counts * (labels == 1)) for side in ranks)
        else:
            label_ranks = _ranks(label_ties, counts)
            before, after = (_correlation(side, label_ranks, counts) for side in ranks)
        yield after - before


def _ranks(tie_groups: Counts, counts: Counts) -> Numbers:
    """Ranks in a resample, [pairs]; tied pairs share their mean rank."""
    sizes = np.bincount(tie_groups, weights=counts)
    return np.asarray((np.cumsum(sizes) - (sizes - 1) / 2)[tie_groups])


def _roc_auc(ranks: Numbers, positive_counts: Counts) -> float:
    """ROC-AUC from the rank sum of the positives (Hanley and McNeil 1982)."""
    positives = int(positive_counts.sum())
    negatives = len(ranks) - positives
    return float((positive_counts @ ranks - positives * (positives + 1) / 2) / (positives * negatives))


def _correlation(left: Numbers, right: Numbers, counts: Counts) -> float:
    """Pearson's correlation in a resample; `numpy.cov` takes five times as long."""
    left, right = (values - counts @ values / len(values) for values in (left, right))
    spread = np.sqrt((counts @ left**2) * (counts @ right**2))
    return float(counts @ (left * right) / spread) if spread > _ROUNDING else 0.0


def _pair_scores(similarities: Numbers, labels: Numbers, binary: bool) -> Numbers:
    """How well each pair is ranked, [pairs]; see `compare_pairs`."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    ranks = rankdata(similarities)
    if not binary:
        return np.asarray(-np.abs(ranks - rankdata(labels)))
    positive = labels == 1
    for side in (positive, ~positive):
        ranks[side] -= rankdata(similarities[side])  # now the number of pairs with the other label below
    return np.asarray(np.where(positive, ranks / (~positive).sum(), 1 - ranks / positive.sum()))
