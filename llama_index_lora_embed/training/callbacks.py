"""Trainer callbacks: evaluation with early stopping and stopping on signals, and the log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from llama_index_lora_embed.core.files import append_json_line
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.checkpointing.signals import EvaluationStoppedError, StopRequest
from llama_index_lora_embed.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)
PROGRESS_METRICS = ("hit@5", "ndcg@10", "roc_auc", "spearman")
"""Metrics of an evaluation that a line of progress shows."""
_NEAR = 0.2  # of the steps between evaluations: what they change is small beside what an evaluation costs


class Evaluator(TrainerCallback):
    """Evaluates every `every` steps (0: at no step) and at the end of each epoch.

    A step within a fifth of `every` from the end of an epoch or of the training is not evaluated: the evaluation there
    says nearly the same. Training stops on a signal, and after `patience` evaluations in a row without a new best (0:
    never).
    """

    def __init__(self, trainer: LoraTrainer, every: int, patience: int, stop: StopRequest) -> None:
        self.trainer = trainer
        self.every = every
        self.patience = patience
        self.stop = stop
        self.stopping = False
        if distributed.world_size() == 1:  # otherwise one process would stop while the others wait for it
            trainer.selection.interruptible = stop.interruptible

    def catch_up(self, state: TrainerState) -> bool:
        """Make the evaluation that was due at the checkpoint's step, before the first step of a resumed run.

        Returns:
            Whether training must not go on: nothing more is gained, or a stop was requested.
        """
        epoch_ends = state.epoch is not None and abs(state.epoch - round(state.epoch)) < 1e-6
        if state.global_step and (epoch_ends or self._due(state) or state.global_step == state.max_steps):
            self._evaluate(state, self.trainer.control)
        return self.stopping or self._gains_nothing()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the base, which was evaluated before the callbacks were set up."""
        history = self.trainer.selection.history
        if state.global_step == 0 and history:
            self.trainer.report(history[0]["metrics"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if that was requested; otherwise evaluate if it is due."""
        if self.stop.requested():
            self._request_stop(control)
        elif self._due(state):
            self._evaluate(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate."""
        if not self.stopping:
            self._evaluate(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if that was requested while saving."""
        if self.stop.requested():
            self.stopping = control.should_training_stop = True

    def _due(self, state: TrainerState) -> bool:
        if not self.every or state.global_step % self.every:
            return False
        epoch, total = float(state.epoch or 0), state.max_steps
        steps_per_epoch = state.global_step / epoch if epoch else total
        distances = abs(epoch - round(epoch)) * steps_per_epoch, total - state.global_step
        # an epoch's last step is evaluated at its end
        return not any(0 < round(distance) <= _NEAR * self.every for distance in distances)

    def _gains_nothing(self) -> bool:
        return bool(self.patience) and self.trainer.selection.evaluations_without_gain() >= self.patience

    def _request_stop(self, control: TrainerControl) -> None:
        self.stopping = True
        control.should_training_stop = True
        control.should_save = self.trainer.saved_step != self.trainer.state.global_step

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        selection = self.trainer.selection
        before = len(selection.history)
        try:
            metrics = selection.evaluate_step(self.trainer.model, state.global_step)
        except EvaluationStoppedError:
            self._request_stop(control)
            return
        if metrics and len(selection.history) > before:
            self.trainer.report(metrics)
        if self._gains_nothing():
            control.should_training_stop = True


class RunLog(TrainerCallback):
    """Appends what the trainer logs (loss, learning rate, metrics) to a file, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if not distributed.is_main() or not logs:
            return
        finite = {n: v if not isinstance(v, float) or math.isfinite(v) else str(v) for n, v in logs.items()}  # for JSON
        try:
            append_json_line(self.path, {"step": state.global_step, **finite, "time": round(time.time(), 3)})
        except OSError as error:  # a full disk must not end the run
            logger.warning("step %d could not be logged to %s: %s", state.global_step, self.path, error)


class ProgressLines(TrainerCallback):
    """Tells what the trainer logs in plain lines, for logs and for terminals without progress bars.

    Args:
        show: Shows a line.
    """

    def __init__(self, show: Callable[[str], None] = print) -> None:
        self.show = show
        self.started = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show a line: step, loss and learning rate, or the metrics of an evaluation."""
        logs = logs or {}
        named = {"loss": "loss", "learning_rate": "learning rate"}
        told = [f"{label} {logs[name]:.4g}" for name, label in named.items() if name in logs]
        told += [f"{name} {logs[f'eval_{name}']:.3f}" for name in PROGRESS_METRICS if f"eval_{name}" in logs]
        if told and distributed.is_main():
            seconds = f"{time.perf_counter() - self.started:.0f} s"
            self.show(f"step {state.global_step} of {state.max_steps}: {', '.join([*told, seconds])}")
