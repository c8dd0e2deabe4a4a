"""sentence-transformers' trainer, with what its checkpoints, its evaluation and its NaN handling lack."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from llama_index_lora_embed.adapter import CONFIG_NAME, WEIGHTS_NAME, replace_directory, staging_beside
from llama_index_lora_embed.errors import AdapterError, NonFiniteLossError

logger = logging.getLogger(__name__)

PRIMARY_METRIC = "ndcg@10"
_BEST_WEIGHTS = "best_adapter.safetensors"
_EVALUATIONS = "evaluations.json"


class Evaluated(Protocol):
    """What an evaluation has to tell the training: its measures, `ndcg@10` among them, as means and by query."""

    @property
    def metrics(self) -> dict[str, float]:
        """Measures by name, each from 0 to 1."""
        ...

    def scores(self, measure: str) -> list[float]:
        """A measure of each query, in the same order in every evaluation."""
        ...


Evaluate = Callable[[SentenceTransformer], Evaluated]


@dataclass
class BestSoFar:
    """Evaluates, and keeps the adapter weights to be written; step 0, the base, is the first candidate.

    A step that does not beat the base is never kept. Among those that do, the one kept is the latest whose mean is
    no more than a standard error (of the paired difference) below the highest: on few questions the highest is
    often chance, and the rate has come down at a later step (the one-standard-error rule; Breiman et al., 1984,
    section 3.4.3). In a run on tenk_train the highest of four evaluations on 68 questions was the first epoch's (0.838
    against 0.833 to 0.834), which on another fold of the training side is 0.015 below the third's
    (benchmarks/README.md).

    Attributes:
        evaluate: Judges a model; None if there is nothing to judge by.
        history: One entry for each evaluation: step and measures.
        best_step: Step that is kept.
        base: The evaluation at step 0.
        best: The evaluation of the step that is kept.
        top: nDCG@10 of each query at the evaluation with the highest mean.
        weights: Adapter weights that are kept, on the CPU.
        seconds: Wall time of the evaluations of this process.
    """

    evaluate: Evaluate | None
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    base: Evaluated | None = None
    best: Evaluated | None = None
    top: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] | None = None
    seconds: float = 0.0

    def __call__(self, model: SentenceTransformer, step: int) -> dict[str, float]:
        """Evaluate the model at this step, unless that was done already."""
        if self.evaluate is None:
            return {}
        for entry in self.history:
            if entry["step"] == step:
                return dict(entry["metrics"])
        started = time.perf_counter()
        evaluation = self.evaluate(model)
        self.seconds += time.perf_counter() - started
        metrics = dict(evaluation.metrics)
        self.history.append({"step": step, "metrics": metrics})
        if step == 0:
            self.base = evaluation
        if self._keep(evaluation.scores(PRIMARY_METRIC)):
            self.best_step, self.best, self.weights = step, evaluation, adapter_weights(model)
        return metrics

    def _keep(self, scores: list[float]) -> bool:
        """Whether the latest entry of the history is the one to keep."""
        values = [entry["metrics"][PRIMARY_METRIC] for entry in self.history]
        if not values[:-1] or values[-1] > max(values[:-1]):
            self.top = scores
            return True
        behind = torch.tensor(self.top, dtype=torch.float64) - torch.tensor(scores, dtype=torch.float64)
        error = float(behind.std() / math.sqrt(len(behind))) if len(behind) > 1 else 0.0
        return bool(values[-1] > values[0] and float(behind.mean()) <= error)

    def save(self, directory: Path) -> None:
        """Write the state into a checkpoint."""
        state = {"best_step": self.best_step, "history": self.history, "top": self.top}
        (directory / _EVALUATIONS).write_text(json.dumps(state), encoding="utf-8")
        if self.weights is not None:
            save_file(self.weights, directory / _BEST_WEIGHTS)

    def load(self, directory: Path) -> None:
        """Take the state from a checkpoint; per-query results of earlier evaluations are not in it."""
        path = directory / _EVALUATIONS
        state = json.loads(path.read_text(encoding="utf-8"))
        self.best_step, self.history = state["best_step"], state["history"]
        self.top = state["top"]
        self.best = self.base if self.best_step == 0 else None
        if (directory / _BEST_WEIGHTS).exists():
            self.weights = load_file(directory / _BEST_WEIGHTS)


def adapter_weights(model: SentenceTransformer) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU, by peft's names."""
    state = get_peft_model_state_dict(model.transformers_model, adapter_name="default")
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def restore_weights(model: SentenceTransformer, weights: dict[str, Tensor]) -> None:
    """Put adapter weights into the model.

    Raises:
        AdapterError: Names do not fit one to one.
    """
    names = adapter_weights(model).keys()
    if names != weights.keys():
        odd = sorted(names ^ weights.keys())
        raise AdapterError(
            f"adapter weights with {len(odd)} name(s) that do not fit (e.g. {odd[0]})",
            "the weights of the same LoRA on the same base",
            "Start without resume_from_checkpoint, or restore lora_config.",
        )
    set_peft_model_state_dict(model.transformers_model, dict(weights), adapter_name="default")


class LoraTrainer(SentenceTransformerTrainer):
    """The trainer with one adapter, no dropout in the frozen base, and checkpoints that are whole or absent.

    Args:
        best_so_far: Evaluates at the end of each epoch and every `evaluation_steps` steps.
        evaluation_steps: 0 for epochs only.
        autocast_dtype: Computing precision of the steps; None for float32.
        warmup_ratio: Share of all steps; None leaves warmup to the arguments.
        **kwargs: As for SentenceTransformerTrainer.
    """

    def __init__(
        self,
        *,
        best_so_far: BestSoFar,
        evaluation_steps: int,
        autocast_dtype: torch.dtype | None,
        warmup_ratio: float | None,
        **kwargs: Any,
    ) -> None:
        self.best_so_far = best_so_far
        self.autocast_dtype = autocast_dtype
        self.warmup_ratio = warmup_ratio
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)  # would print a dict at each log where there is no bar
        self.add_callback(_EvaluateCallback(self, evaluation_steps))

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the adapter's README is written with the manifest."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule over the steps that are really taken.

        transformers rounds the warmup up, and a first step at rate 0 would be all of a very short run.
        """
        if self.warmup_ratio is not None:
            self.args.warmup_steps = round(self.warmup_ratio * num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss_context_manager(self) -> ExitStack:
        """Autocast for the loss alone, so that evaluations between steps stay in float32."""
        stack = ExitStack()
        if self.autocast_dtype is not None:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=self.autocast_dtype))
        return stack

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One step; stops at the first loss that is not finite, before it can reach the weights.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteLossError(
                f"a loss of {loss.item()} at step {self.state.global_step + 1}",
                "a finite number",
                f"Lower learning_rate (now {self.args.learning_rate:g}) or set precision='fp32'; nothing was written, "
                "and earlier checkpoints are intact.",
            )
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss with the frozen base's dropout off; a dropout of the LoRA's own stays on."""
        model.eval()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and hasattr(module, "lora_dropout"):
                module.lora_dropout.train()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # the parent also pickles the arguments, which nothing here would load
        self.model.save_pretrained(str(output_dir or self.args.output_dir), create_model_card=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint aside, sync it and move it into place, then remove the oldest."""
        target = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        target.parent.mkdir(parents=True, exist_ok=True)
        run_dir, limit = self.args.output_dir, self.args.save_total_limit
        with staging_beside(target) as staging:
            self.args.output_dir, self.args.save_total_limit = str(staging), None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir, self.args.save_total_limit = run_dir, limit
            written = staging / target.name
            self.best_so_far.save(written)
            shutil.rmtree(target, ignore_errors=True)  # the same step, from before a resume
            replace_directory(written, target)
        kept = sorted(target.parent.glob("checkpoint-*"), key=_step_of)
        for old in kept[: -limit if limit else 0]:
            shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        stored = load_file(path / WEIGHTS_NAME)  # whole, or latest_checkpoint had passed it over
        restore_weights(self.model, {name.removeprefix("base_model.model."): t for name, t in stored.items()})
        self.best_so_far.load(path)


class _EvaluateCallback(TrainerCallback):
    """Evaluates every so many steps and at the end of each epoch."""

    def __init__(self, trainer: LoraTrainer, every: int) -> None:
        self.trainer = trainer
        self.every = every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a checkpoint of an epoch's last step is written before that epoch is evaluated
        if state.global_step and state.epoch is not None and abs(state.epoch - round(state.epoch)) < 1e-6:
            self._evaluate(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._evaluate(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluate(state)

    def _evaluate(self, state: TrainerState) -> None:
        metrics = self.trainer.best_so_far(self.trainer.model, state.global_step)
        if metrics:
            self.trainer.log({f"eval_{name}": round(value, 4) for name, value in metrics.items()})


def _step_of(path: Path) -> int:
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def latest_checkpoint(directory: Path) -> str | None:
    """The newest whole checkpoint of a run, or None; damaged ones are passed over, and said."""
    for path in sorted(directory.glob("checkpoint-*"), key=_step_of, reverse=True):
        try:
            for name in (WEIGHTS_NAME, _BEST_WEIGHTS):
                if name == WEIGHTS_NAME or (path / name).exists():
                    load_file(path / name)
            for name in (_EVALUATIONS, CONFIG_NAME, TRAINER_STATE_NAME):
                json.loads((path / name).read_text(encoding="utf-8"))
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
                torch.load(path / name, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
            logger.warning("checkpoint %s is damaged and passed over: %s", path, error)
            continue
        return str(path)
    return None
