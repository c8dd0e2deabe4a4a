"""Evaluations of several settings on one dataset, and the best of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.evaluation.compare import compare
from llama_index_lora_embed.evaluation.metrics import NAMES
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation
from llama_index_lora_embed.evaluation.verdict import Comparison

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Sweep(Generic[Setting]):
    """Evaluations of several settings; print it.

    Attributes:
        best: The setting with the highest metric; among ties the one that is closest to the base.
        metric: The metric that decided.
        evaluations: Setting to evaluation.
        comparison: The best compared with the base; None if the base was not evaluated.
    """

    best: Setting
    metric: str
    evaluations: dict[Setting, RetrievalEvaluation] = field(repr=False)
    comparison: Comparison | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        evaluations: Mapping[Setting, RetrievalEvaluation],
        metric: str,
        base: Setting,
        distance: Callable[[Setting], Any],
        trained_on: Collection[str] | None,
    ) -> Sweep[Setting]:
        """The sweep of some evaluations.

        Args:
            evaluations: Setting to evaluation.
            metric: The metric that decides.
            base: The setting that is the base.
            distance: Of a setting from the base.
            trained_on: Origins of the queries that the adapters were trained on; see `compare`.
        """
        best = max(evaluations, key=lambda setting: (evaluations[setting].metrics[metric], -distance(setting)))
        before = evaluations.get(base)
        comparison = None if before is None else compare(before, evaluations[best], trained_on=trained_on)
        return cls(best, metric, dict(evaluations), comparison)

    def scores(self) -> dict[Setting, float]:
        """Setting to its value of the metric."""
        return {setting: found.metrics[self.metric] for setting, found in self.evaluations.items()}

    def __str__(self) -> str:
        lines = [f"{setting}: {self.metric} {value:.3f}" for setting, value in self.scores().items()]
        if self.comparison is not None:
            chosen = f"The best of {len(self.evaluations)} was chosen on these same queries."
            lines.append(f"{self.best} against the base: {self.comparison} {chosen}")
        return "\n".join(lines)


def check_metric(metric: str) -> None:
    """Check that the retrieval evaluation has a metric.

    Raises:
        ConfigError: It is unknown.
    """
    if metric not in NAMES:
        raise ConfigError(f"metric={metric!r}", f"one of {', '.join(NAMES)}", "metric='ndcg@10'")
