"""Base against tuned: the difference with its uncertainty, and a verdict that names what it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.dataset import HUMAN
from llama_index_lora_embed.evaluation.pairs import Numbers, PairEvaluation
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation
from llama_index_lora_embed.evaluation.significance import FEWEST, interval, paired_intervals

_PAIR_RESAMPLES = 1000
_METRIC = "ndcg@10"
_WRITTEN = {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP", "roc_auc": "ROC-AUC", "spearman": "Spearman"}
_FEWEST = 5  # pairs of each label, or twice as many graded ones; resamples of fewer hardly differ
_ROUNDING = 1e-9  # ranks are counts and their halves; what is smaller than this is no difference
# origins that say nothing of who asked; everything else but HUMAN was made up
_UNKNOWN = "unknown"
# models that were judged by made-up and by real questions (benchmarks/verdicts.py; benchmarks/README.md, "Verdicts")
_TRIALS, _RIGHT = 17, 8

Flags = NDArray[np.bool_]


class Verdict(str, Enum):
    """What a comparison comes to."""

    BETTER = "BETTER"
    NO_CLEAR_DIFFERENCE = "NO CLEAR DIFFERENCE"
    WORSE = "WORSE"
    NOT_EVALUATED = "NOT EVALUATED"


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same queries, or of the same labelled pairs, compared.

    Attributes:
        verdict: BETTER or WORSE if the whole interval is on one side of 0.
        difference: Difference of the metric, tuned minus base; of queries, its mean.
        interval: Its 95 % interval.
        queries: Number of queries, or of pairs, compared.
        won: Queries with a higher nDCG@10; pairs that are ranked better (see `compare_pairs`).
        lost: Queries with a lower one; pairs that are ranked worse.
        basis: Which questions or pairs it rests on, in words.
        metric: "ndcg@10" of queries; "roc_auc" of pairs labelled 0 and 1, "spearman" of graded ones.
    """

    verdict: Verdict
    difference: float
    interval: tuple[float, float]
    queries: int
    won: int
    lost: int
    basis: str
    metric: str = _METRIC

    def __str__(self) -> str:
        low, high = self.interval
        counts = f"{self.won} queries won, {self.lost} lost of {self.queries}"
        if self.metric != _METRIC:
            counts = f"{self.won} pairs ranked better, {self.lost} worse of {self.queries}"
        return (
            f"{self.verdict.value}: {written(self.metric)} {self.difference:+.3f} "
            f"(95 % interval {low:+.3f} to {high:+.3f}), {counts}. {self.basis}"
        )


def written(metric: str) -> str:
    """A measure's name as people write it: "nDCG@10"."""
    name, at, cut = metric.partition("@")
    return _WRITTEN.get(name, name.replace("_", " ")) + at + cut


def compare(
    base: RetrievalEvaluation | PairEvaluation, tuned: RetrievalEvaluation | PairEvaluation, *, seed: int = 0
) -> Comparison:
    """Compare two models on the same queries, or on the same labelled pairs (see `compare_pairs`).

    The interval of queries is `bootstrap.paired_intervals`. With fewer than ten queries the verdict is NO CLEAR
    DIFFERENCE whatever it is.

    Args:
        base: Evaluation of the base.
        tuned: Evaluation of the tuned model on the same dataset.
        seed: Of the resamples.

    Raises:
        DatasetError: The two were evaluated on different queries, passages or pairs, or one on queries and one on
            pairs.
    """
    if isinstance(base, PairEvaluation) and isinstance(tuned, PairEvaluation):
        return compare_pairs(base, tuned, seed=seed)
    if isinstance(base, PairEvaluation) or isinstance(tuned, PairEvaluation):
        raise DatasetError(
            "an evaluation of queries and one of labelled pairs",
            "two of one kind",
            "Evaluate both models on one dataset, with the same function.",
        )
    check_same_dataset(base, tuned)
    differences = np.array([tuned.per_query[i][_METRIC] - base.per_query[i][_METRIC] for i in base.per_query])
    found = paired_intervals(differences[:, None], seed=seed)[0]
    few = len(differences) < FEWEST
    return Comparison(
        Verdict.NO_CLEAR_DIFFERENCE if few else _verdict(found),
        float(differences.mean()),
        found,
        len(differences),
        int((differences > 0).sum()),
        int((differences < 0).sum()),
        " ".join([describe_basis(base.origins), *_by_kind(base, differences), *(["Those are too few to tell."] * few)]),
    )


def check_same_dataset(base: RetrievalEvaluation, tuned: RetrievalEvaluation) -> None:
    """See that two evaluations are of one dataset, as far as they tell.

    Raises:
        DatasetError: They asked different queries, searched different passages, or were judged differently.
    """
    if base.per_query.keys() != tuned.per_query.keys():
        raise DatasetError(
            "two evaluations of different queries",
            "the same dataset for both",
            "Evaluate both on one dataset.",
        )
    if base.passages != tuned.passages or (base.digest and tuned.digest and base.digest != tuned.digest):
        raise DatasetError(
            f"two evaluations of different datasets ({base.passages} and {tuned.passages} passages)",
            "the same queries, passages and judgments for both: of fewer passages the right one is found more easily",
            "Evaluate both on one dataset.",
        )


def compare_pairs(base: PairEvaluation, tuned: PairEvaluation, *, seed: int = 0) -> Comparison:
    """Compare two models on the same labelled pairs: by ROC-AUC if the labels are 0 and 1, by Spearman if graded.

    The interval is a paired bootstrap over the pairs (percentiles of the difference over 1,000 resamples; pairs
    labelled 1 and 0 are drawn apart, so that each resample has as many of both). With fewer than five pairs of
    either label, or ten graded ones, the verdict is NO CLEAR DIFFERENCE whatever the interval.

    A pair is won if the tuned model ranks it better, and lost if worse. Of labels 0 and 1: its placement, the share
    of the pairs with the other label that it is on the right side of (DeLong et al., 1988; their mean is the ROC
    AUC), rose. Of graded ones: its rank by similarity came nearer to its rank by label, as Spearman counts it.

    Args:
        base: Evaluation of the base.
        tuned: Evaluation of the tuned model on the same pairs.
        seed: Of the resamples.

    Raises:
        DatasetError: The two were evaluated on different pairs.
    """
    if base.digest != tuned.digest or len(base.labels) != len(tuned.labels):
        raise DatasetError(
            f"two evaluations of different pairs ({len(base.labels)} and {len(tuned.labels)})",
            "the same pairs in the same order for both",
            "Evaluate both models on one LabelledPairs.",
        )
    both, rng = (base.similarities, tuned.similarities), np.random.default_rng(seed)
    if base.binary:
        differences = _auc_differences(*both, base.labels == 1, rng)
        gains = _placements(tuned.similarities, base.labels == 1) - _placements(base.similarities, base.labels == 1)
    else:
        differences = _spearman_differences(*both, base.labels, rng)
        everyone, wanted = np.ones(len(base.labels)), _Ranks(base.labels)
        off = [abs(_Ranks(values).weighted(everyone) - wanted.weighted(everyone)) for values in both]
        gains = off[0] - off[1]
    found = interval(differences)
    counts = ", ".join(f"{count} {kind}" for kind, count in base.origins.items())
    basis = f"It rests on {len(base.labels)} labelled pairs, {counts}."
    few = min(base.origins.values()) < _FEWEST * (1 if base.binary else 2)
    if few:
        basis += " Those are too few to tell."
    return Comparison(
        Verdict.NO_CLEAR_DIFFERENCE if few else _verdict(found),
        tuned.metrics[base.metric] - base.metrics[base.metric],
        found,
        len(base.labels),
        int((gains > _ROUNDING).sum()),
        int((gains < -_ROUNDING).sum()),
        basis,
        base.metric,
    )


def _verdict(interval: tuple[float, float]) -> Verdict:
    """BETTER or WORSE if the whole interval is on one side of 0."""
    if interval[0] > 0:
        return Verdict.BETTER
    return Verdict.WORSE if interval[1] < 0 else Verdict.NO_CLEAR_DIFFERENCE


def _auc_differences(base: Numbers, tuned: Numbers, positive: Flags, rng: np.random.Generator) -> list[float]:
    """Difference of the ROC-AUC in each resample.

    A resample is a number of draws for each pair. Against sorted negatives the AUC is then one cumulative sum and one
    look-up, and nothing is sorted again.
    """
    sides = [_Below(values, positive) for values in (base, tuned)]
    ones, zeros = int(positive.sum()), int((~positive).sum())
    found = []
    for _ in range(_PAIR_RESAMPLES):
        drawn_ones, drawn_zeros = rng.integers(ones, size=ones), _draws(zeros, rng)
        before, after = (float(side.shares(drawn_zeros)[drawn_ones].mean()) for side in sides)
        found.append(after - before)
    return found


class _Below:
    """Which share of resampled negatives lies below each positive; a tie counts half.

    Args:
        values: Similarities, [pairs].
        positive: Whether the label is 1, [pairs].
    """

    def __init__(self, values: Numbers, positive: Flags) -> None:
        self.order = np.argsort(values[~positive], kind="stable")
        ordered = values[~positive][self.order]
        self.low = np.searchsorted(ordered, values[positive], side="left")
        self.high = np.searchsorted(ordered, values[positive], side="right")

    def shares(self, draws: NDArray[np.int64]) -> Numbers:
        """[positives], from how often each negative was drawn, [negatives]."""
        total = np.concatenate(([0], np.cumsum(draws[self.order])))
        return np.asarray((total[self.low] + total[self.high]) / (2 * total[-1]))


def _placements(values: Numbers, positive: Flags) -> Numbers:
    """Share of the pairs with the other label that each pair is on the right side of; [pairs], 0 to 1."""
    found = np.empty(len(values))
    found[positive] = _Below(values, positive).shares(np.ones((~positive).sum(), dtype=np.int64))
    # of the negatives: with signs turned around, they are to lie above
    found[~positive] = _Below(-values, ~positive).shares(np.ones(positive.sum(), dtype=np.int64))
    return found


def _spearman_differences(base: Numbers, tuned: Numbers, labels: Numbers, rng: np.random.Generator) -> list[float]:
    """Difference of Spearman's correlation in each resample; a correlation with equal values is 0."""
    wanted, sides = _Ranks(labels), [_Ranks(values) for values in (base, tuned)]
    found = []
    for _ in range(_PAIR_RESAMPLES):
        draws = _draws(len(labels), rng).astype(np.float64)
        target = wanted.weighted(draws)
        before, after = (_correlation(side.weighted(draws), target, draws) for side in sides)
        found.append(after - before)
    return found


class _Ranks:
    """Ranks in a resample, where each pair counts as often as it was drawn; ties have their mean rank.

    Args:
        values: [pairs].
    """

    def __init__(self, values: Numbers) -> None:
        self.group = np.unique(values, return_inverse=True)[1]

    def weighted(self, draws: Numbers) -> Numbers:
        """[pairs], from how often each pair was drawn, [pairs]."""
        sizes = np.bincount(self.group, weights=draws)
        return np.asarray((np.cumsum(sizes) - (sizes - 1) / 2)[self.group])


def _correlation(left: Numbers, right: Numbers, weights: Numbers) -> float:
    """Pearson's correlation with weights; 0 where one side is constant."""
    total = weights.sum()
    left, right = left - weights @ left / total, right - weights @ right / total
    spread = np.sqrt((weights @ left**2) * (weights @ right**2))
    return float(weights @ (left * right) / spread) if spread > _ROUNDING else 0.0


def _draws(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each of `count` pairs is in a resample of as many."""
    return np.bincount(rng.integers(count, size=count), minlength=count)


def _by_kind(base: RetrievalEvaluation, differences: Numbers) -> list[str]:
    """A sentence where made-up questions of one kind gain and those of another do not; else nothing.

    Sentences cut from passages gain whatever is trained on such; titles are nearer to what people ask
    (benchmarks/README.md, "Verdicts").
    """
    kinds: dict[str, list[float]] = {}
    for query_id, difference in zip(base.per_query, differences, strict=True):
        origin = base.query_origins.get(query_id, _UNKNOWN)
        if origin not in (HUMAN, _UNKNOWN):
            kinds.setdefault(origin, []).append(float(difference))
    means = {origin: float(np.mean(values)) for origin, values in kinds.items() if len(values) >= FEWEST}
    if len(means) < 2 or min(means.values()) > max(means.values()) / 2 or max(means.values()) <= 0:
        return []
    told = ", ".join(f"{mean:+.3f} on {len(kinds[o])} made by {o.replace('_', ' ')}" for o, mean in means.items())
    return [f"Kinds of questions disagree ({told}): the lowest is the safest guess."]


def describe_basis(origins: dict[str, int]) -> str:
    """One sentence on which questions a verdict rests, and how far to trust it.

    Args:
        origins: Number of questions by how they were made.
    """
    made_up = {name: count for name, count in origins.items() if name not in (HUMAN, _UNKNOWN)}
    people, unknown = origins.get(HUMAN, 0), origins.get(_UNKNOWN, 0)
    parts = [f"{people} asked by people"] if people else []
    parts += [f"{count} made by {name.replace('_', ' ')}" for name, count in made_up.items()]
    parts += [f"{unknown} of unknown origin"] if unknown else []
    sentence = f"It rests on {', '.join(parts)}."
    if made_up and not people:
        sentence += (
            " Made-up questions flatter: they resemble those trained on more than your users' questions do, and in "
            f"{_TRIALS} trials the sign on the latter was theirs {_RIGHT} times. Judge by a val_dataset of real "
            "questions where you can; where not, LoraEmbedding(path, adapter_scale=0.5) risks less."
        )
    return sentence
