"""Which weights are kept: the base is the first candidate, and one highest figure is not yet better."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.lora import adapter_weights

BEST_WEIGHTS = "best_adapter.safetensors"
EVALUATIONS = "evaluations.json"


class Evaluated(Protocol):
    """What an evaluation has to tell the training: its measures, as means and by query."""

    @property
    def metrics(self) -> dict[str, float]:
        """Measures by name; higher is better."""
        ...

    def scores(self, measure: str) -> list[float]:
        """A measure of each query, in the same order in every evaluation; empty for one that has no such parts."""
        ...


Evaluate = Callable[[SentenceTransformer], Evaluated]


@dataclass
class CheckpointSelection:
    """Evaluates, and keeps the adapter weights to be written; step 0, the base, is the first candidate.

    A step that does not beat the base is never kept. Among those that do, the one kept is the latest whose mean is
    no more than a standard error (of the paired difference) below the highest: on few questions the highest is
    often chance, and the rate has come down at a later step (the one-standard-error rule; Breiman et al., 1984,
    section 3.4.3). In a run on tenk_train the highest of four evaluations on 68 questions was the first epoch's (0.838
    against 0.833 to 0.834), which on another fold of the training side is 0.015 below the third's
    (benchmarks/README.md). A measure without parts by query (ROC-AUC) has no such error: there the highest is kept.

    Where several processes train, the main one evaluates and tells the others.

    Attributes:
        evaluate: Judges a model; None if there is nothing to judge by.
        metric: Measure to go by.
        history: One entry for each evaluation: step and measures.
        best_step: Step that is kept.
        base: The evaluation at step 0.
        best: The evaluation of the step that is kept.
        top: The measure of each query at the evaluation with the highest mean.
        weights: Adapter weights that are kept, on the CPU.
        seconds: Wall time of the evaluations of this process.
        interruptible: Context in which an evaluation runs, and what may end it; what was measured by then is dropped.
    """

    evaluate: Evaluate | None
    metric: str = "ndcg@10"
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    base: Evaluated | None = None
    best: Evaluated | None = None
    top: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] | None = None
    seconds: float = 0.0
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self, model: SentenceTransformer, step: int) -> dict[str, float]:
        """Evaluate the model at this step, unless that was done already.

        Raises:
            ConfigError: The evaluation has no measure of the name to go by.
        """
        if self.evaluate is None:
            return {}
        for entry in self.history:
            if entry["step"] == step:
                return dict(entry["metrics"])
        with self.interruptible():
            evaluation = self.judge(model)
        metrics = dict(evaluation.metrics)
        if self.metric not in metrics:
            raise ConfigError(
                f"best_metric={self.metric!r}",
                f"one of {', '.join(metrics)}, which the evaluation reports",
                "Choose one of these, or leave it at None.",
            )
        self.history.append({"step": step, "metrics": metrics})
        if step == 0:
            self.base = evaluation
        if self._keep(evaluation.scores(self.metric)):
            self.best_step, self.best, self.weights = step, evaluation, adapter_weights(model)
        return metrics

    def judge(self, model: SentenceTransformer) -> Evaluated:
        """Evaluate without keeping anything but the time it took."""
        evaluate = self.evaluate
        assert evaluate is not None
        started = time.perf_counter()
        evaluation = distributed.on_main(lambda: evaluate(model))
        self.seconds += time.perf_counter() - started
        return evaluation

    def _keep(self, scores: list[float]) -> bool:
        """Whether the latest entry of the history is the one to keep."""
        values = self._values()
        if not values[:-1] or values[-1] > max(values[:-1]):
            self.top = scores
            return True
        behind = torch.tensor(self.top, dtype=torch.float64) - torch.tensor(scores, dtype=torch.float64)
        if not len(behind):
            return False
        error = float(behind.std() / math.sqrt(len(behind))) if len(behind) > 1 else 0.0
        return bool(values[-1] > values[0] and float(behind.mean()) <= error)

    def without_gain(self) -> int:
        """Evaluations since the highest one."""
        values = self._values()
        return len(values) - 1 - values.index(max(values)) if values else 0

    def _values(self) -> list[float]:
        return [entry["metrics"][self.metric] for entry in self.history]

    def save(self, directory: Path) -> None:
        """Write the state into a checkpoint."""
        state = {"best_step": self.best_step, "history": self.history, "top": self.top}
        (directory / EVALUATIONS).write_text(json.dumps(state), encoding="utf-8")
        if self.weights is not None:
            save_file(self.weights, directory / BEST_WEIGHTS)

    def load(self, directory: Path) -> None:
        """Take the state from a checkpoint; per-query results of earlier evaluations are not in it."""
        state = json.loads((directory / EVALUATIONS).read_text(encoding="utf-8"))
        self.best_step, self.history, self.top = state["best_step"], state["history"], state["top"]
        self.best = self.base if self.best_step == 0 else None
        if (directory / BEST_WEIGHTS).exists():
            self.weights = load_file(directory / BEST_WEIGHTS)
