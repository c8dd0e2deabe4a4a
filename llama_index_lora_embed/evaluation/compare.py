"""Compare two evaluations of the same dataset: differences in the metrics, their significance, and a verdict."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.evaluation.pair_comparison import compare_pairs
from llama_index_lora_embed.evaluation.pairs import PairEvaluation
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation
from llama_index_lora_embed.evaluation.significance import paired_intervals, sign_test
from llama_index_lora_embed.evaluation.verdict import Comparison, weigh

_METRIC = "ndcg@10"


@dataclass(frozen=True)
class Difference:
    """Difference between two models in one metric: means from 0 to 1, and numbers of improved and degraded queries.

    Attributes:
        difference: tuned - base.
        interval: 95 % confidence interval of the difference (`significance.paired_intervals`).
        p_value: Of the sign test (`significance.sign_test`).
    """

    base: float
    tuned: float
    difference: float
    interval: tuple[float, float]
    improved: int
    degraded: int
    p_value: float


def compare(
    base: RetrievalEvaluation | PairEvaluation,
    tuned: RetrievalEvaluation | PairEvaluation,
    *,
    query_ids: Collection[str] | None = None,
    trained_on: Collection[str] | None = None,
    note: str = "",
    seed: int = 0,
) -> Comparison:
    """Compare two models on the same queries, or on the same labelled pairs (see `compare_pairs`).

    The verdict rests on the strongest evidence among the queries (`verdict.weigh`). With fewer than ten queries it is
    NO CLEAR DIFFERENCE, whatever the interval (`significance.paired_intervals`) says.

    Args:
        base: Evaluation of the base.
        tuned: Evaluation of the tuned model.
        query_ids: Queries to compare on; None for all, as always with pairs.
        trained_on: Origins of the queries that the tuned model was trained on; None if they are not known.
        note: A sentence for the basis of the verdict, such as how many of the passages were trained on.
        seed: Random seed of the bootstrap.

    Raises:
        DatasetError: The two evaluations are of different queries, passages or pairs, or one is of queries and the
            other of pairs.
    """
    if isinstance(base, PairEvaluation) and isinstance(tuned, PairEvaluation):
        pairs = compare_pairs(base, tuned, seed=seed)
        return replace(pairs, basis=f"{pairs.basis} {note}".strip())
    if isinstance(base, PairEvaluation) or isinstance(tuned, PairEvaluation):
        raise DatasetError(
            "an evaluation of queries and one of labelled pairs",
            "two evaluations of one kind",
            "Evaluate both models on one dataset, with the same function.",
        )
    _check_same_dataset(base, tuned)
    ids = base.per_query if query_ids is None else query_ids
    changes = {i: tuned.per_query[i][_METRIC] - base.per_query[i][_METRIC] for i in ids}
    found = weigh(changes, base.query_origins, trained_on, seed=seed)
    values = [changes[i] for i in found.query_ids]
    return Comparison(
        verdict=found.verdict,
        difference=float(np.mean(values)),
        interval=found.interval,
        queries=len(values),
        improved=sum(value > 0 for value in values),
        degraded=sum(value < 0 for value in values),
        evidence=found.evidence,
        basis=f"{found.basis} {note}".strip(),
        unchanged=not any(changes.values()),
    )


def metric_differences(
    base: RetrievalEvaluation,
    tuned: RetrievalEvaluation,
    query_ids: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Difference]:
    """The difference in each metric that both evaluations have, by its name.

    Args:
        base: Evaluation of the base.
        tuned: Evaluation of the tuned model.
        query_ids: Queries to compare on; None for all.
        metrics: Names of metrics; None for all.
        seed: Random seed of the bootstrap.

    Raises:
        DatasetError: The two evaluations are of different queries, passages or judgments.
    """
    _check_same_dataset(base, tuned)
    ids = list(base.per_query if query_ids is None else query_ids)
    names = [name for name in (metrics or base.metrics) if name in base.metrics and name in tuned.metrics]
    before, after = (
        np.array([[evaluation.per_query[i][name] for name in names] for i in ids]) for evaluation in (base, tuned)
    )
    changes = after - before
    differences = {}
    for column, (name, interval) in enumerate(zip(names, paired_intervals(changes, seed=seed), strict=True)):
        old, new, change = (float(values[:, column].mean()) for values in (before, after, changes))
        improved, degraded = int((changes[:, column] > 0).sum()), int((changes[:, column] < 0).sum())
        differences[name] = Difference(old, new, change, interval, improved, degraded, sign_test(improved, degraded))
    return differences


def _check_same_dataset(base: RetrievalEvaluation, tuned: RetrievalEvaluation) -> None:
    if base.per_query.keys() != tuned.per_query.keys():
        raise DatasetError(
            "two evaluations of different queries", "the same dataset for both", "Evaluate both models on one dataset."
        )
    if base.passages != tuned.passages or (base.digest and tuned.digest and base.digest != tuned.digest):
        raise DatasetError(
            f"two evaluations of different datasets ({base.passages} and {tuned.passages} passages)",
            "the same queries, passages and judgments for both, because a smaller corpus is easier to search",
            "Evaluate both models on one dataset.",
        )
