"""Evaluations of several settings on one dataset: one half of the queries chooses the best, the other judges it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.split import halves
from llama_index_lora_embed.evaluation.compare import compare
from llama_index_lora_embed.evaluation.metrics import NAMES
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation
from llama_index_lora_embed.evaluation.verdict import Comparison, Verdict

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Sweep(Generic[Setting]):
    """Evaluations of several settings; print it.

    The best of several settings is too good on the queries that it was chosen on. Therefore the queries are split by
    source document (`data.split.halves`): one half chooses, and the verdict rests on the other. Where all queries are
    tied together, all of them choose, and no gain is called BETTER.

    Attributes:
        best: The setting with the highest metric; among ties the one that is closest to the base.
        metric: The metric that decided.
        chosen_on: Ids of the queries that decided.
        evaluations: Setting to evaluation on all queries.
        comparison: The best compared with the base on the other queries; None if the base was not evaluated.
    """

    best: Setting
    metric: str
    chosen_on: tuple[str, ...] = field(repr=False)
    evaluations: dict[Setting, RetrievalEvaluation] = field(repr=False)
    comparison: Comparison | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        evaluations: Mapping[Setting, RetrievalEvaluation],
        dataset: EmbeddingQAFinetuneDataset,
        metric: str,
        base: Setting,
        distance: Callable[[Setting], Any],
        trained_on: Collection[str] | None,
    ) -> Sweep[Setting]:
        """The sweep of some evaluations.

        Args:
            evaluations: Setting to evaluation.
            dataset: The dataset of the evaluations.
            metric: The metric that decides.
            base: The setting that is the base.
            distance: Of a setting from the base.
            trained_on: Origins of the queries that the adapters were trained on; see `compare`.
        """
        choosing, judging = halves(dataset)
        scores = {setting: _mean(found, metric, choosing) for setting, found in evaluations.items()}
        best = max(scores, key=lambda setting: (scores[setting], -distance(setting)))
        before, comparison = evaluations.get(base), None
        if before is not None:
            comparison = compare(before, evaluations[best], query_ids=judging or choosing, trained_on=trained_on)
        if comparison is not None and not judging:
            basis = f"It was chosen on these same queries, which are all tied together. {comparison.basis}".strip()
            worse = comparison.verdict is Verdict.WORSE
            verdict = Verdict.WORSE if worse else Verdict.NO_CLEAR_DIFFERENCE
            comparison = replace(comparison, verdict=verdict, basis=basis)
        return cls(best, metric, tuple(choosing), dict(evaluations), comparison)

    def scores(self) -> dict[Setting, float]:
        """Setting to its mean of the metric over the queries that decided."""
        return {setting: _mean(found, self.metric, self.chosen_on) for setting, found in self.evaluations.items()}

    def __str__(self) -> str:
        lines = [f"{setting}: {self.metric} {value:.3f}" for setting, value in self.scores().items()]
        lines[0] += f" (on the {len(self.chosen_on)} queries that decided)"
        if self.comparison is not None:
            lines.append(f"{self.best} against the base: {self.comparison}")
        return "\n".join(lines)


def _mean(evaluation: RetrievalEvaluation, metric: str, query_ids: Collection[str]) -> float:
    return float(np.mean([evaluation.per_query[i][metric] for i in query_ids]))


def check_metric(metric: str) -> None:
    """Check that the retrieval evaluation has a metric.

    Raises:
        ConfigError: It is unknown.
    """
    if metric not in NAMES:
        raise ConfigError(f"metric={metric!r}", f"one of {', '.join(NAMES)}", "metric='ndcg@10'")
