"""The verdict of a comparison, and the evidence that it is based on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from llama_index_lora_embed.data.dataset import HUMAN
from llama_index_lora_embed.evaluation.metrics import metric_label
from llama_index_lora_embed.evaluation.significance import MIN_QUERIES

_UNKNOWN = "unknown"  # every other origin but HUMAN is synthetic
# models that were evaluated on synthetic and on human-written queries (benchmarks/verdicts.py; benchmarks/README.md,
# "Verdicts"), and those of them for which both gave the same sign
_TRIALS, _SAME_SIGN = 17, 8


class Verdict(str, Enum):
    """Outcome of a comparison."""

    BETTER = "BETTER"
    NO_CLEAR_DIFFERENCE = "NO CLEAR DIFFERENCE"
    WORSE = "WORSE"
    NOT_EVALUATED = "NOT EVALUATED"


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same queries, or on the same labelled pairs, compared.

    Attributes:
        verdict: BETTER or WORSE if the whole interval is on one side of 0.
        difference: Difference in the metric, tuned minus base; for queries, its mean.
        interval: 95 % confidence interval of the difference.
        queries: Number of queries, or of pairs.
        improved: Queries with a higher nDCG@10; pairs that are ranked better (see `compare_pairs`).
        degraded: Queries with a lower nDCG@10; pairs that are ranked worse.
        basis: The queries or pairs that the verdict is based on, in words.
        metric: "ndcg@10" for queries; "roc_auc" for pairs labelled 0 and 1, "spearman" for graded pairs.
    """

    verdict: Verdict
    difference: float
    interval: tuple[float, float]
    queries: int
    improved: int
    degraded: int
    basis: str
    metric: str = "ndcg@10"

    def __str__(self) -> str:
        low, high = self.interval
        counts = f"{self.improved} of {self.queries} queries improved, {self.degraded} degraded"
        if self.metric != "ndcg@10":
            counts = f"{self.improved} of {self.queries} pairs ranked better, {self.degraded} worse"
        return (
            f"{self.verdict.value}: {metric_label(self.metric)} {self.difference:+.3f} "
            f"(95 % interval {low:+.3f} to {high:+.3f}), {counts}. {self.basis}"
        )


def decide(interval: tuple[float, float], enough: bool) -> Verdict:
    """The verdict for the interval of a difference, if there are enough queries or pairs for one."""
    if enough and interval[0] > 0:
        return Verdict.BETTER
    return Verdict.WORSE if enough and interval[1] < 0 else Verdict.NO_CLEAR_DIFFERENCE


def describe_queries(origins: Mapping[str, int]) -> str:
    """State which queries a verdict is based on, from their number by origin, and how far to trust it."""
    synthetic = {origin: count for origin, count in origins.items() if origin not in (HUMAN, _UNKNOWN)}
    human, unknown = origins.get(HUMAN, 0), origins.get(_UNKNOWN, 0)
    parts = [f"{human} human-written queries"] if human else []
    parts += [f"{count} synthetic queries ({_origin_label(origin)})" for origin, count in synthetic.items()]
    parts += [f"{unknown} queries of unknown origin"] if unknown else []
    sentence = f"Based on {', '.join(parts)}."
    if synthetic and not human:
        sentence += (
            " Synthetic queries overstate the gain, because they resemble the training queries more than real queries "
            f"do: human-written queries gave a difference of the same sign in {_SAME_SIGN} of {_TRIALS} trials. "
            "Evaluate on a val_dataset of human-written queries if you can; otherwise "
            "LoraEmbedding(path, adapter_scale=0.5) is the smaller risk."
        )
    return sentence


def describe_disagreement(origins: Mapping[str, str], changes: Mapping[str, float]) -> str:
    """A sentence if one kind of synthetic queries gains much more than another, else an empty string.

    Sentences cut from passages gain whenever a model is trained on such sentences; titles are closer to what users
    write (benchmarks/README.md, "Verdicts"). `changes` is query id to difference in nDCG@10.
    """
    by_origin: dict[str, list[float]] = {}
    for query_id, change in changes.items():
        origin = origins.get(query_id, _UNKNOWN)
        if origin not in (HUMAN, _UNKNOWN):
            by_origin.setdefault(origin, []).append(change)
    means = {origin: float(np.mean(values)) for origin, values in by_origin.items() if len(values) >= MIN_QUERIES}
    if len(means) < 2 or max(means.values()) <= 0 or min(means.values()) > max(means.values()) / 2:
        return ""
    values = ", ".join(f"{mean:+.3f} on {len(by_origin[o])} of {_origin_label(o)}" for o, mean in means.items())
    return f"The kinds of synthetic queries disagree ({values}): the lowest value is the safest estimate."


def _origin_label(origin: str) -> str:
    return origin.replace("_", " ")
