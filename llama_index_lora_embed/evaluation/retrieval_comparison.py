"""Two embedding models side by side on a dataset: measures, verdict, queries won and lost, slices, a regression_set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llama_index_lora_embed.config.base import is_share
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.evaluation.compare import Comparison, Verdict, check_same_dataset, compare
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval, judged_digest
from llama_index_lora_embed.evaluation.significance import paired_intervals, sign_test
from llama_index_lora_embed.evaluation.slices import slices_of

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

REGRESSION_LIMIT = 0.02
"""Mean nDCG@10 that a general dataset may lose: on 790 queries a difference of that size is beyond chance
(benchmarks/README.md), and a user of search would hardly notice less."""

_FOUND = 5  # of a ranking that a query's outcome shows


@dataclass(frozen=True)
class Difference:
    """One measure of two models.

    Attributes:
        base: Mean of the base, 0 to 1.
        tuned: Mean of the tuned model.
        difference: tuned - base.
        interval: 95 % interval of the difference (`bootstrap.paired_intervals`).
        won: Queries with more of it.
        lost: Queries with less of it.
        p_value: Of the sign test (`bootstrap.sign_test`).
    """

    base: float
    tuned: float
    difference: float
    interval: tuple[float, float]
    won: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class QueryOutcome:
    """What became of one query.

    Attributes:
        query_id: Its id.
        text: Its wording.
        base: nDCG@10 with the base.
        tuned: nDCG@10 with the tuned model.
        relevant: Ids of its relevant passages.
        base_found: Ids of the five passages that the base ranked highest, best first.
        tuned_found: The same of the tuned model.
    """

    query_id: str
    text: str
    base: float
    tuned: float
    relevant: tuple[str, ...]
    base_found: tuple[str, ...]
    tuned_found: tuple[str, ...]

    @property
    def change(self) -> float:
        """nDCG@10, tuned - base."""
        return self.tuned - self.base


@dataclass(frozen=True)
class SliceOutcome:
    """nDCG@10 on some of the queries.

    Attributes:
        by: What they were chosen by: "length", "style", "origin", "source", "truncated", or "own".
        name: Which of them.
        queries: How many.
        measured: Their nDCG@10.
    """

    by: str
    name: str
    queries: int
    measured: Difference


@dataclass(frozen=True)
class RegressionCheck:
    """A second dataset, on what the model is not tuned for.

    Attributes:
        measured: Its nDCG@10.
        queries: How many.
        limit: Drop of the mean that is allowed.
    """

    measured: Difference
    queries: int
    limit: float

    @property
    def alive(self) -> bool:
        """Whether the drop is within the limit."""
        return -self.measured.difference <= self.limit

    def __str__(self) -> str:
        low, high = self.measured.interval
        return (
            f"{'regression set held' if self.alive else 'REGRESSED'}: nDCG@10 {self.measured.difference:+.3f} "
            f"(95 % interval {low:+.3f} to {high:+.3f}) on {self.queries} general queries, "
            f"-{self.limit:.3f} allowed"
        )


@dataclass(frozen=True)
class RetrievalComparison:
    """Base against tuned on one dataset; print it, or see `tables` and `report`.

    Attributes:
        comparison: nDCG@10 with its interval, the verdict, and what it rests on.
        measures: Every measure by name.
        queries: Every query's outcome, the most gained first and the most lost last.
        slices: Some of the queries at a time.
        regression_set: What a general dataset says; None if there was none.
        base: Evaluation of the base.
        tuned: Evaluation of the tuned model.
        dataset: What both were evaluated on.
        names: What the two are called.
    """

    comparison: Comparison
    measures: dict[str, Difference]
    queries: list[QueryOutcome] = field(repr=False)
    slices: list[SliceOutcome] = field(repr=False)
    regression_set: RegressionCheck | None
    base: RetrievalEvaluation = field(repr=False)
    tuned: RetrievalEvaluation = field(repr=False)
    dataset: EmbeddingQAFinetuneDataset = field(repr=False)
    names: tuple[str, str] = ("base", "tuned")

    @property
    def verdict(self) -> Verdict:
        """BETTER, NO CLEAR DIFFERENCE or WORSE on the dataset itself; the regression_set has its own word."""
        return self.comparison.verdict

    @property
    def won(self) -> list[QueryOutcome]:
        """Queries with a higher nDCG@10, the most gained first."""
        return [query for query in self.queries if query.change > 0]

    @property
    def lost(self) -> list[QueryOutcome]:
        """Queries with a lower nDCG@10, the most lost first."""
        return [query for query in reversed(self.queries) if query.change < 0]

    @property
    def notes(self) -> list[str]:
        """What both evaluations have to say beside their measures, each once."""
        return list(dict.fromkeys([*self.base.notes, *self.tuned.notes]))

    def __str__(self) -> str:
        """The verdict in one line."""
        return f"{self.comparison}{'' if self.regression_set is None else f' {self.regression_set}.'}"


def compare_retrieval(
    base: BaseEmbedding | RetrievalEvaluation,
    tuned: BaseEmbedding | RetrievalEvaluation,
    dataset: EmbeddingQAFinetuneDataset,
    *,
    regression_set: EmbeddingQAFinetuneDataset | tuple[RetrievalEvaluation, RetrievalEvaluation] | None = None,
    regression_limit: float = REGRESSION_LIMIT,
    slices: Mapping[str, Sequence[str]] | None = None,
    names: tuple[str, str] = ("base", "tuned"),
    num_workers: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> RetrievalComparison:
    """Compare two embedding models on the queries of a dataset.

    Args:
        base: The model to compare with, or its evaluation on this dataset.
        tuned: The model that is to be better, or its evaluation.
        dataset: Questions, corpus and judgments that neither was trained on.
        regression_set: General queries on which the tuned model must not lose more than `regression_limit`; or both
            models' evaluations on them, where base and tuned are evaluations too.
        regression_limit: Drop of the mean nDCG@10 that is allowed there, 0 to 1.
        slices: Further slices by name, as query ids; beside those by length, style, origin, source document and whether
            the tuned model cuts the relevant passage.
        names: What to call the two.
        num_workers: As of `evaluate_retrieval`.
        cache_folder: As of `evaluate_retrieval`.
        seed: Of the resamples.
        show_progress: Show bars.

    Raises:
        ConfigError: regression_limit is no number from 0 to 1, or a regression_set dataset is given for evaluations, or
            a model's vectors cannot be compared.
        DatasetError: The dataset is empty or inconsistent, was not the one of the evaluations, or a slice has no
            queries or unknown ones.
        NonFiniteLossError: Vectors are NaN or infinite.

    Example:
        >>> print(compare_retrieval(LoraEmbedding(base_model=base), LoraEmbedding("runs/handbook"), val))
        ... # doctest: +SKIP
        BETTER: nDCG@10 +0.107 (95 % interval +0.086 to +0.128), 274 queries won, 113 lost of 790. ...
    """
    if not is_share(regression_limit):
        raise ConfigError(
            f"regression_limit={regression_limit!r}", "a number from 0 to 1", f"regression_limit={REGRESSION_LIMIT}"
        )
    if len(set(names)) != 2 or len(names) != 2 or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(f"names={names!r}", "two different texts", 'names=("base", "tuned")')
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    settings = {"num_workers": num_workers, "cache_folder": cache_folder, "show_progress": show_progress}

    def evaluated(model: BaseEmbedding | RetrievalEvaluation, on: EmbeddingQAFinetuneDataset) -> RetrievalEvaluation:
        if isinstance(model, RetrievalEvaluation):
            return model
        return evaluate_retrieval(model, on, **settings)  # type: ignore[arg-type]

    parts = slices_of(dataset, tuned, slices)  # before hours of embedding, because it can be refused
    if isinstance(regression_set, tuple):
        if len(regression_set) != 2 or not all(
            isinstance(evaluation, RetrievalEvaluation) for evaluation in regression_set
        ):
            raise ConfigError(
                f"regression_set with {', '.join(type(one).__name__ for one in regression_set) or 'nothing'} in it",
                "a dataset, or the evaluations of base and tuned on one",
                "regression_set=(evaluate_retrieval(base, general), evaluate_retrieval(tuned, general))",
            )
        on_canary = regression_set
    elif regression_set is not None:
        if isinstance(base, RetrievalEvaluation) or isinstance(tuned, RetrievalEvaluation):
            raise ConfigError(
                "a regression_set dataset with a model that is already an evaluation",
                "both models, or both models' evaluations of the regression_set",
                "regression_set=(evaluate_retrieval(base, general), evaluate_retrieval(tuned, general))",
            )
        regression_set = EmbeddingQAFinetuneDataset.coerce(regression_set, "regression_set").check("regression_set")
    before, after, digest = evaluated(base, dataset), evaluated(tuned, dataset), judged_digest(dataset)
    for evaluation, name in zip((before, after), names, strict=True):
        if evaluation.per_query.keys() != dataset.queries.keys() or evaluation.digest not in ("", digest):
            raise DatasetError(
                f"an evaluation of {name} on {len(evaluation.per_query)} queries and {evaluation.passages} passages, "
                f"and a dataset of {len(dataset.queries)} and {len(dataset.corpus)}, which are not the same",
                "evaluations of the dataset itself",
                "Pass the dataset that both were evaluated on.",
            )
    if regression_set is not None and not isinstance(regression_set, tuple):
        on_canary = evaluated(base, regression_set), evaluated(tuned, regression_set)
    return RetrievalComparison(
        compare(before, after, seed=seed),
        differences(before, after, seed=seed),
        _outcomes(before, after, dataset),
        [
            SliceOutcome(by, name, len(ids), differences(before, after, ids, ["ndcg@10"], seed=seed)["ndcg@10"])
            for by, name, ids in parts
        ],
        None
        if regression_set is None
        else RegressionCheck(
            differences(*on_canary, names=["ndcg@10"], seed=seed)["ndcg@10"],
            len(on_canary[0].per_query),
            float(regression_limit),
        ),
        before,
        after,
        dataset,
        names,
    )


def differences(
    base: RetrievalEvaluation,
    tuned: RetrievalEvaluation,
    query_ids: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Difference]:
    """The difference of each measure over queries.

    Args:
        base: One evaluation.
        tuned: Another of the same queries.
        query_ids: Which; None for all.
        names: Measures; None for all that both have.
        seed: Of the resamples.

    Raises:
        DatasetError: The two are of different queries or passages.
    """
    ids = list(base.per_query if query_ids is None else query_ids)
    check_same_dataset(base, tuned)
    chosen = [n for n in (names or base.metrics) if n in base.metrics and n in tuned.metrics]
    before, after = (
        np.array([[evaluation.per_query[i][name] for name in chosen] for i in ids]) for evaluation in (base, tuned)
    )
    change = after - before
    intervals = paired_intervals(change, seed=seed)
    found = {}
    for column, name in enumerate(chosen):
        won, lost = int((change[:, column] > 0).sum()), int((change[:, column] < 0).sum())
        means = float(before[:, column].mean()), float(after[:, column].mean())
        found[name] = Difference(*means, means[1] - means[0], intervals[column], won, lost, sign_test(won, lost))
    return found


def _outcomes(
    base: RetrievalEvaluation, tuned: RetrievalEvaluation, dataset: EmbeddingQAFinetuneDataset
) -> list[QueryOutcome]:
    outcomes = [
        QueryOutcome(
            i,
            text,
            base.per_query[i]["ndcg@10"],
            tuned.per_query[i]["ndcg@10"],
            tuple(dict.fromkeys(dataset.relevant_docs[i])),
            tuple(base.rankings.get(i, ())[:_FOUND]),
            tuple(tuned.rankings.get(i, ())[:_FOUND]),
        )
        for i, text in dataset.queries.items()
    ]
    return sorted(outcomes, key=lambda outcome: -outcome.change)
