"""Compare two embedding models on a dataset: verdict, metrics, single queries, slices, and a regression set."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from llama_index_lora_embed.config.base import is_share
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.evaluation.compare import Difference, compare, metric_differences
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval, evaluation_digest
from llama_index_lora_embed.evaluation.slices import make_slices
from llama_index_lora_embed.evaluation.verdict import Comparison, Verdict

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

REGRESSION_LIMIT = 0.02
"""Accepted loss of mean nDCG@10 on the regression set. On 790 queries a larger loss is significant
(benchmarks/README.md), and users would hardly notice a smaller one."""

_METRIC = "ndcg@10"
_TOP = 5  # passages of each ranking that are kept for a query


@dataclass(frozen=True)
class QueryOutcome:
    """nDCG@10 of both models for one query; ids of its relevant passages and of the five best of each model."""

    query_id: str
    text: str
    base: float
    tuned: float
    relevant: tuple[str, ...]
    base_top: tuple[str, ...]
    tuned_top: tuple[str, ...]

    @property
    def change(self) -> float:
        """Difference in nDCG@10, tuned - base."""
        return self.tuned - self.base


@dataclass(frozen=True)
class SliceOutcome:
    """nDCG@10 on a slice of the queries, by length, style, origin, source or truncation, or a custom one."""

    by: str
    name: str
    queries: int
    ndcg: Difference


@dataclass(frozen=True)
class RegressionCheck:
    """nDCG@10 on a regression set (general queries, unrelated to the training data); `limit` is the accepted loss."""

    ndcg: Difference
    queries: int
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the loss is within the limit."""
        return -self.ndcg.difference <= self.limit

    def __str__(self) -> str:
        low, high = self.ndcg.interval
        return (
            f"Regression set {'passed' if self.passed else 'FAILED'}: nDCG@10 {self.ndcg.difference:+.3f} "
            f"(95 % interval {low:+.3f} to {high:+.3f}) on {self.queries} queries; accepted loss {self.limit:.3f}."
        )


@dataclass(frozen=True)
class RetrievalComparison:
    """Evaluations of two models on one dataset, compared; print it, or see `report.tables` and `report.html`.

    Attributes:
        comparison: nDCG@10 with its interval, the verdict, and the queries that it is based on.
        metrics: Difference in each metric.
        queries: Outcome of every query, from the largest gain to the largest loss.
        slices: nDCG@10 on slices of the queries.
        regression_set: nDCG@10 on the regression set; None without one.
    """

    comparison: Comparison
    metrics: dict[str, Difference]
    queries: list[QueryOutcome] = field(repr=False)
    slices: list[SliceOutcome] = field(repr=False)
    regression_set: RegressionCheck | None
    base: RetrievalEvaluation = field(repr=False)
    tuned: RetrievalEvaluation = field(repr=False)
    dataset: EmbeddingQAFinetuneDataset = field(repr=False)
    names: tuple[str, str] = ("base", "tuned")

    @property
    def verdict(self) -> Verdict:
        """The verdict on the dataset; the regression set has its own result."""
        return self.comparison.verdict

    @property
    def improved(self) -> list[QueryOutcome]:
        """Queries with a higher nDCG@10, the largest gain first."""
        return [query for query in self.queries if query.change > 0]

    @property
    def degraded(self) -> list[QueryOutcome]:
        """Queries with a lower nDCG@10, the largest loss first."""
        return [query for query in reversed(self.queries) if query.change < 0]

    @property
    def notes(self) -> list[str]:
        """The notes of both evaluations, each once."""
        return list(dict.fromkeys([*self.base.notes, *self.tuned.notes]))

    def __str__(self) -> str:
        return " ".join(str(result) for result in (self.comparison, self.regression_set) if result is not None)


def compare_retrieval(
    base: BaseEmbedding | RetrievalEvaluation,
    tuned: BaseEmbedding | RetrievalEvaluation,
    dataset: EmbeddingQAFinetuneDataset,
    *,
    regression_set: EmbeddingQAFinetuneDataset | tuple[RetrievalEvaluation, RetrievalEvaluation] | None = None,
    regression_limit: float = REGRESSION_LIMIT,
    slices: Mapping[str, Sequence[str]] | None = None,
    trained_on: Collection[str] | None = None,
    names: tuple[str, str] = ("base", "tuned"),
    num_workers: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> RetrievalComparison:
    """Compare two embedding models on a dataset.

    Args:
        base: The model to compare with, or its evaluation on this dataset.
        tuned: The model that should be better, or its evaluation on this dataset.
        dataset: Queries, corpus and judgments that neither model was trained on.
        regression_set: General queries on which the tuned model must not lose more than `regression_limit`. If base and
            tuned are evaluations, both models' evaluations on it.
        regression_limit: Accepted loss of the mean nDCG@10 on the regression set, 0 to 1.
        slices: Custom slices: name to query ids. There are slices by length, style, origin, source document and
            truncation of the relevant passages anyway.
        trained_on: Origins of the queries that the tuned model was trained on, for the verdict on synthetic queries;
            None takes them from the manifest of a `LoraEmbedding`.
        names: Names of the two models.
        num_workers: See `evaluate_retrieval`.
        cache_folder: See `evaluate_retrieval`.
        seed: Random seed of the bootstrap.
        show_progress: Show progress bars.

    Raises:
        ConfigError: regression_limit is not a number from 0 to 1, names are not two different strings, regression_set
            does not fit base and tuned, or the vectors of a model cannot be compared.
        DatasetError: The dataset is empty or inconsistent, the evaluations are of another one, or a custom slice is
            empty or has unknown queries.
        NonFiniteLossError: Vectors are NaN or infinite.

    Example:
        >>> print(compare_retrieval(LoraEmbedding(base_model=base), LoraEmbedding("runs/handbook"), val))
        ... # doctest: +SKIP
        BETTER on 790 human-written queries: nDCG@10 +0.107 (95 % interval +0.086 to +0.128), 274 of 790 ...
    """
    if not is_share(regression_limit):
        hint = f"regression_limit={REGRESSION_LIMIT}"
        raise ConfigError(f"regression_limit={regression_limit!r}", "a number from 0 to 1", hint)
    if len(names) != 2 or not all(isinstance(name, str) and name.strip() for name in names) or names[0] == names[1]:
        raise ConfigError(f"names={names!r}", "two different strings", 'names=("base", "tuned")')
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    query_slices = make_slices(dataset, tuned, slices)  # its checks come before hours of embedding
    evaluate = partial(
        evaluate_retrieval, num_workers=num_workers, cache_folder=cache_folder, show_progress=show_progress
    )
    regression = None
    if regression_set is not None:
        general = _evaluate_regression_set(regression_set, base, tuned, evaluate)
        ndcg = metric_differences(*general, metrics=[_METRIC], seed=seed)[_METRIC]
        regression = RegressionCheck(ndcg, len(general[0].per_query), float(regression_limit))
    before, after = (
        model if isinstance(model, RetrievalEvaluation) else evaluate(model, dataset) for model in (base, tuned)
    )
    digest = evaluation_digest(dataset)
    for evaluation, name in zip((before, after), names, strict=True):
        if evaluation.per_query.keys() != dataset.queries.keys() or evaluation.digest not in ("", digest):
            raise DatasetError(
                f"an evaluation of {name} on another dataset ({len(evaluation.per_query)} queries and "
                f"{evaluation.passages} passages)",
                f"evaluations on the given dataset ({len(dataset.queries)} queries and {len(dataset.corpus)} passages)",
                "Pass the dataset that both models were evaluated on.",
            )
    slice_outcomes = []
    for by, name, ids in query_slices:
        ndcg = metric_differences(before, after, ids, [_METRIC], seed=seed)[_METRIC]
        slice_outcomes.append(SliceOutcome(by, name, len(ids), ndcg))
    if trained_on is None:
        manifest = getattr(tuned, "manifest", None)
        trained_on = None if manifest is None else manifest.trained_on
    return RetrievalComparison(
        compare(before, after, trained_on=trained_on, seed=seed),
        metric_differences(before, after, seed=seed),
        _query_outcomes(before, after, dataset),
        slice_outcomes,
        regression,
        before,
        after,
        dataset,
        names,
    )


def _evaluate_regression_set(
    given: EmbeddingQAFinetuneDataset | tuple[RetrievalEvaluation, RetrievalEvaluation],
    base: BaseEmbedding | RetrievalEvaluation,
    tuned: BaseEmbedding | RetrievalEvaluation,
    evaluate: Callable[..., RetrievalEvaluation],
) -> tuple[RetrievalEvaluation, RetrievalEvaluation]:
    hint = "regression_set=(evaluate_retrieval(base, general), evaluate_retrieval(tuned, general))"
    if isinstance(given, tuple):
        if len(given) == 2 and all(isinstance(evaluation, RetrievalEvaluation) for evaluation in given):
            return given
        raise ConfigError(
            f"regression_set with {', '.join(type(item).__name__ for item in given) or 'nothing'} in it",
            "a dataset, or the evaluations of base and tuned on one",
            hint,
        )
    if isinstance(base, RetrievalEvaluation) or isinstance(tuned, RetrievalEvaluation):
        raise ConfigError(
            "a regression_set dataset, but evaluations instead of models",
            "two models, or the evaluations of both on the regression set",
            hint,
        )
    general = EmbeddingQAFinetuneDataset.coerce(given, "regression_set").check("regression_set")
    return evaluate(base, general), evaluate(tuned, general)


def _query_outcomes(
    base: RetrievalEvaluation, tuned: RetrievalEvaluation, dataset: EmbeddingQAFinetuneDataset
) -> list[QueryOutcome]:
    outcomes = [
        QueryOutcome(
            i,
            text,
            base.per_query[i][_METRIC],
            tuned.per_query[i][_METRIC],
            tuple(dict.fromkeys(dataset.relevant_docs[i])),
            tuple(base.rankings.get(i, ())[:_TOP]),
            tuple(tuned.rankings.get(i, ())[:_TOP]),
        )
        for i, text in dataset.queries.items()
    ]
    return sorted(outcomes, key=lambda outcome: -outcome.change)
