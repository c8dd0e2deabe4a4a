"""What happens between steps: evaluation, early stopping, a stop on request, and the log."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.checkpointing.signals import EvaluationStoppedError, StopRequest
from llama_index_lora_embed.training.trainer import LoraTrainer


class Evaluator(TrainerCallback):
    """Evaluates every so many steps and at the end of each epoch; stops when asked, or when nothing more is gained.

    Args:
        trainer: Whose `best_so_far` evaluates.
        every: Steps between evaluations; 0 for epochs only.
        patience: Evaluations in a row without a new highest figure after which training stops; 0 for never.
        stop: Says when a signal has asked for a stop.
    """

    def __init__(self, trainer: LoraTrainer, every: int, patience: int, stop: StopRequest) -> None:
        self.trainer = trainer
        self.every = every
        self.patience = patience
        self.stop = stop
        self.stopping = False
        if distributed.world_size() == 1:  # else one process would leave while the others wait for it
            trainer.best_so_far.interruptible = stop.interruptible

    def catch_up(self, state: TrainerState) -> bool:
        """Do what the checkpoint's own run did not come to any more, before the first step.

        Returns:
            Whether there is nothing left to train, or a stop was asked for.
        """
        epoch_ends = state.epoch is not None and abs(state.epoch - round(state.epoch)) < 1e-6
        if state.global_step and (epoch_ends or self._due(state) or state.global_step == state.max_steps):
            self._evaluate(state, self.trainer.control)
        return self.stopping or self._gains_nothing()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the base, which was evaluated before the other callbacks were ready to hear of it."""
        history = self.trainer.best_so_far.history
        if state.global_step == 0 and history:
            self.trainer.report(history[0]["metrics"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if asked to; else evaluate if it is due."""
        if self.stop.asked():
            self._leave(control)
        elif self._due(state):
            self._evaluate(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate."""
        if not self.stopping:
            self._evaluate(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if asked to while saving."""
        if self.stop.asked():
            self.stopping = control.should_training_stop = True

    def _due(self, state: TrainerState) -> bool:
        return bool(self.every and state.global_step % self.every == 0)

    def _gains_nothing(self) -> bool:
        return bool(self.patience) and self.trainer.best_so_far.without_gain() >= self.patience

    def _leave(self, control: TrainerControl) -> None:
        self.stopping = True
        control.should_training_stop = True
        control.should_save = self.trainer.saved_step != self.trainer.state.global_step

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        best = self.trainer.best_so_far
        seen = len(best.history)
        try:
            metrics = best(self.trainer.model, state.global_step)
        except EvaluationStoppedError:
            self._leave(control)
            return
        if metrics and len(best.history) > seen:
            self.trainer.report(metrics)
        if self._gains_nothing():
            control.should_training_stop = True


class RunLog(TrainerCallback):
    """Appends what the trainer logs (loss, rate, measures) to a file, one JSON object a line.

    Args:
        path: `log.jsonl` in the run directory.
    """

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
        values = {name: _number(value) for name, value in logs.items()}
        line = json.dumps({"step": state.global_step, **values, "time": round(time.time(), 3)})
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:  # a full disk: a line of the log is not worth the run
            return


def _number(value: Any) -> Any:
    """Infinities and NaN, which JSON has no numbers for, as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
