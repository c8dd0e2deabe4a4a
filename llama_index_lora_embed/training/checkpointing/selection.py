"""Checkpoint selection: which step's adapter weights are kept. Step 0, the base, is the first candidate."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.lora import adapter_weights, restore_weights, scaled_adapter

logger = logging.getLogger(__name__)
Subset: TypeAlias = dict[str, list[str]]
"""Ids of the part of the validation data on which steps are compared, by kind; JSON values."""

BEST_WEIGHTS = "best_adapter.safetensors"
EVALUATIONS = "evaluations.json"
_STATE = ("best_step", "history", "top_scores", "subset")


class Evaluation(Protocol):
    """What training needs of an evaluation: its metrics, as means and per query."""

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each metric by name; higher is better."""

    def scores(self, metric: str) -> list[float]:
        """A metric of each query, in the same order in every evaluation; empty if it has no value per query."""


@dataclass(frozen=True)
class Installed:
    """The evaluation of a starting model as installed, where step 0 reads texts otherwise.

    Attributes:
        evaluation: The evaluation.
        change: What is different at step 0, in words: "512 tokens", "windows of 512 tokens".
    """

    evaluation: Evaluation
    change: str


@dataclass
class CheckpointSelection:
    """Evaluates steps and keeps the adapter weights of the best one.

    A step that does not beat the base is never kept; nor, where step 0 is the base with another length, other prompts
    or windows, one that does not beat the base as installed. Among those that do, the latest is kept whose mean is at
    most one standard error (of the paired difference) below the highest: on few queries the highest is often chance,
    and the learning rate is lower at a later step (the one-standard-error rule; Breiman et al., 1984, section 3.4.3).
    In a run on tenk_train the highest of four evaluations on 68 queries was the first epoch's (0.838 against 0.833 to
    0.834), which on another fold of the training side is 0.015 below the third's (benchmarks/README.md). A metric
    without values per query (ROC-AUC) has no such error: there the highest is kept.

    Where `subset_of` finds a smaller set that compares steps as well, all steps, step 0 too, are evaluated on it. Base
    and best are evaluated on all data, and the base is kept if the best does not beat it there.

    Where several processes train, the main one evaluates and broadcasts the result.

    Attributes:
        evaluator: Evaluates a model on all validation data, or on the subset that is its second argument; None if there
            is no validation data.
        metric: Name of the metric to select by.
        adapter_scale: Share of the trained change that is evaluated and kept.
        subset_of: Makes the subset from the base's evaluation on all data; it, or its result, is None for all data.
        evaluate_as_installed: Evaluates the starting model as installed, given the model with its starting weights;
            returns None where step 0 is the same.
        history: Step and metrics of each evaluation, all on the same data.
        best_step: Step that is kept.
        subset: What `subset_of` returned; checkpoints hold it, so that a resumed run compares on the same data.
        base: Evaluation of step 0 on all data.
        installed: Of the starting model as installed, on all data; None where it would be `base`.
        best: Evaluation of the step that is kept on all data; None until it is made.
        top_scores: The metric of each query in the evaluation with the highest mean.
        weights: Adapter weights of the step that is kept, on the CPU.
        seconds: Wall time of this process's evaluations.
        interruptible: Context in which an evaluation runs and which may end it; its result is then discarded.
    """

    evaluator: Callable[..., Evaluation] | None
    metric: str = "ndcg@10"
    adapter_scale: float = 1.0
    subset_of: Callable[[Any], Subset | None] | None = None
    evaluate_as_installed: Callable[[SentenceTransformer], Installed | None] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    subset: Subset | None = None
    base: Evaluation | None = None
    installed: Installed | None = None
    best: Evaluation | None = None
    top_scores: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] | None = None
    seconds: float = 0.0
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def reference(self) -> Evaluation | None:
        """What the kept weights are compared with: the starting model as installed."""
        return self.base if self.installed is None else self.installed.evaluation

    @property
    def keeps_installed(self) -> bool:
        """Whether neither a trained step nor what the run changes about lengths, prompts or windows is a gain."""
        if self.evaluator is None or self.best_step:
            return False
        if self.installed is None or self.base is None:
            return True
        return self.installed.evaluation.metrics[self.metric] >= self.base.metrics[self.metric]

    @property
    def kept(self) -> Evaluation | None:
        """Evaluation of what is kept."""
        return self.reference if self.keeps_installed else self.best

    def evaluate_installed(self, model: SentenceTransformer) -> None:
        """Evaluate the starting model as installed, once; `model` has the weights that it starts from."""
        evaluate = self.evaluate_as_installed
        if evaluate is not None and self.installed is None:
            started = time.perf_counter()
            self.installed = distributed.on_main(lambda: evaluate(model))
            self.seconds += time.perf_counter() - started

    def evaluate_step(self, model: SentenceTransformer, step: int) -> dict[str, float]:
        """Metrics of the model at this step, which is evaluated unless it was before.

        Raises:
            ConfigError: The evaluation has no metric of the name to select by.
        """
        if self.evaluator is None:
            return {}
        for entry in self.history:
            if entry["step"] == step:
                return dict(entry["metrics"])
        with scaled_adapter(model, self.adapter_scale):
            with self.interruptible():
                if step == 0:
                    self.base = self.evaluate(model)
                    self._check_metric(self.base)
                    self.subset = None if self.subset_of is None else self.subset_of(self.base)
                if step == 0 and self.subset is None:
                    assert self.base is not None
                    evaluation = self.base
                else:
                    evaluation = self.evaluate(model, self.subset)
            if self.record(step, evaluation):
                self.weights = adapter_weights(model)
        return dict(evaluation.metrics)

    def _check_metric(self, evaluation: Evaluation) -> None:
        if self.metric not in evaluation.metrics:
            raise ConfigError(
                f"best_metric={self.metric!r}",
                f"one of {', '.join(evaluation.metrics)}, which the evaluation reports",
                "Choose one of these, or leave it at None.",
            )

    def evaluate(self, model: SentenceTransformer, subset: Subset | None = None) -> Evaluation:
        """Evaluate a model, on all data or on a subset, without recording the result."""
        evaluator = self.evaluator
        assert evaluator is not None
        started = time.perf_counter()
        evaluation = distributed.on_main(lambda: evaluator(model) if subset is None else evaluator(model, subset))
        self.seconds += time.perf_counter() - started
        return evaluation

    def record(self, step: int, evaluation: Evaluation) -> bool:
        """Add an evaluation to the history; whether its step is the one to keep of all steps so far."""
        self.history.append({"step": step, "metrics": dict(evaluation.metrics)})
        if not self._keep(evaluation.scores(self.metric)):
            return False
        self.best_step = step
        self.best = evaluation if self.subset is None else self.base if step == 0 else None
        return True

    def _keep(self, scores: list[float]) -> bool:
        """Whether the latest entry of the history is the one to keep."""
        values = self._values()
        if not values[:-1]:
            self.top_scores = scores
            return True
        to_beat = values[0]
        if self.installed is not None and self.subset is None:  # else `restore_best` compares them, on all data
            to_beat = max(to_beat, self.installed.evaluation.metrics[self.metric])
        if values[-1] > max(values[:-1]):
            self.top_scores = scores
            return values[-1] > to_beat
        behind = torch.tensor(self.top_scores, dtype=torch.float64) - torch.tensor(scores, dtype=torch.float64)
        if not len(behind):
            return False
        error = float(behind.std() / math.sqrt(len(behind))) if len(behind) > 1 else 0.0
        return bool(values[-1] > to_beat and float(behind.mean()) <= error)

    def evaluations_without_gain(self) -> int:
        """Number of evaluations since the highest one."""
        values = self._values()
        return len(values) - 1 - values.index(max(values)) if values else 0

    def _values(self) -> list[float]:
        return [entry["metrics"][self.metric] for entry in self.history]

    def restore_best(self, model: SentenceTransformer, start: dict[str, Tensor]) -> None:
        """Load the best weights into the model, whose adapter had the weights `start` before the first step.

        Evaluations from before a resume are made again, because checkpoints hold no results per query. If the best step
        of a subset does not beat the base on all data, it is the base that is kept.
        """
        if self.evaluator is None:
            with scaled_adapter(model, self.adapter_scale):
                weights = adapter_weights(model)
            restore_weights(model, weights)
            return
        if self.base is None:
            restore_weights(model, start)
            self.base = self.evaluate(model)
        if self.weights is not None:
            restore_weights(model, self.weights)
        if self.best is None:
            self.best = self.base if self.best_step == 0 else self.evaluate(model)
        value, to_beat = self.best.metrics[self.metric], self.base.metrics[self.metric]
        if self.installed is not None:
            to_beat = max(to_beat, self.installed.evaluation.metrics[self.metric])
        if self.subset is not None and self.best_step and value <= to_beat:
            logger.warning(
                "step %d is the best of the subset that compares steps, but on all validation data its %s is %.3f, and "
                "the base's %.3f: the base is kept",
                *(self.best_step, self.metric, value, to_beat),
            )
            restore_weights(model, start)
            self.best_step, self.best, self.weights = 0, self.base, start

    def save(self, directory: Path) -> None:
        """Write the state into a checkpoint."""
        state = {name: getattr(self, name) for name in _STATE}
        (directory / EVALUATIONS).write_text(json.dumps(state), encoding="utf-8")
        if self.weights is not None:
            save_file(self.weights, directory / BEST_WEIGHTS)

    def load(self, directory: Path) -> None:
        """Load the state from a checkpoint, which holds no results per query."""
        state = json.loads((directory / EVALUATIONS).read_text(encoding="utf-8"))
        for name in _STATE:
            setattr(self, name, state[name])
        self.best = self.base if self.best_step == 0 else None
        if (directory / BEST_WEIGHTS).exists():
            self.weights = load_file(directory / BEST_WEIGHTS)
