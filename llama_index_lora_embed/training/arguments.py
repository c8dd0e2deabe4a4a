"""Training arguments: the user's own, checked by name before anything is loaded, and those of a run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainerCallback, TrainingArguments

from llama_index_lora_embed.config import IN_BATCH, FinetuneConfig, TrainingSettings
from llama_index_lora_embed.config.base import AtLeast0, AtLeast1, Settings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.checkpointing.resume import resume_problems
from llama_index_lora_embed.training.objectives.plan import TrainingPlan

# sentence-transformers' name to the engine's argument for it
_ENGINE_ARGUMENTS = {
    "output_dir": "model_output_path",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size='auto'",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "precision='bf16'",
    "use_cpu": "device='cpu'",
    "disable_tqdm": "show_progress_bar",
    "prompts": "query_prompt and passage_prompt",
    "eval_strategy": "evaluation_steps",
    "eval_steps": "evaluation_steps",
    "eval_on_start": "none: step 0 is always evaluated",
    "do_eval": "val_fraction and val_dataset",
    "metric_for_best_model": "best_metric",
    "greater_is_better": "best_metric",
    "load_best_model_at_end": "best_metric: the best step is always kept",
    "save_strategy": "save_checkpoints",
    "save_steps": "checkpoint_save_steps",
    "save_total_limit": "checkpoint_save_total_limit",
}
# the engine's own that one run may have otherwise, by their group in the configuration
_OF_THIS_RUN = {"warmup_ratio": "training", "save_checkpoints": "training", "resume_from_checkpoint": "output"}
_IN_BATCH = {"batch_sampler": "objective, whose batches hold no false negatives"}


class _CheckedArguments(Settings):
    """What transformers would find out in the middle of training, or not at all."""

    gradient_accumulation_steps: AtLeast1 = 1
    max_steps: AtLeast1 | Literal[-1] = -1
    dataloader_num_workers: AtLeast0 = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 1.0
    gradient_checkpointing: bool | None = None
    activation_checkpointing: bool | None = None


@dataclass(frozen=True)
class UserArguments:
    """A user's callbacks and training arguments, without those of the engine, which are in the configuration."""

    config: FinetuneConfig
    callbacks: tuple[TrainerCallback, ...]
    train_kwargs: dict[str, Any]


def check_user_arguments(
    config: FinetuneConfig, callbacks: Any, train_kwargs: dict[str, Any], *, own_loss: bool = False, pairs: bool = False
) -> UserArguments:
    """The arguments, if they can be used; values that transformers alone can check are refused when training starts.

    Raises:
        ConfigError: Naming all that cannot be used.
    """
    in_batch = not own_loss and config.objective.name_for(pairs) in IN_BATCH
    problems = _callback_problems(callbacks)
    kept = {
        name: value for name, value in train_kwargs.items() if name != "resume_from_checkpoint" or value is not None
    }
    if "warmup_ratio" in kept and kept.get("warmup_steps"):
        problems.append(f"warmup_ratio together with warmup_steps={kept['warmup_steps']!r}: expected one of them")
    for name, group in _OF_THIS_RUN.items():
        if name in kept:
            try:
                config = config.replace(**{group: getattr(config, group).replace(**{name: kept.pop(name)})})
            except ConfigError as error:
                problems += error.problems
    problems += resume_problems(config.output)
    engine_arguments = _ENGINE_ARGUMENTS | (_IN_BATCH if in_batch else {})
    known = {field.name for field in fields(SentenceTransformerTrainingArguments) if field.init}
    for name, value in kept.items():
        if name in engine_arguments:
            problems.append(f"{name}={value!r}: expected the engine's own argument for it, {engine_arguments[name]}")
        elif name not in known:
            own = any(name in type(group).model_fields for group in (config.training, config.data, config.base))
            expected = "it among the arguments of the engine" if own else "a training argument of sentence-transformers"
            problems.append(f"{name}={value!r}: expected {expected}")
    checked = {name: value for name, value in kept.items() if name in _CheckedArguments.model_fields}
    try:
        _CheckedArguments.validated(checked)
    except ConfigError as error:
        problems += error.problems
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if checked.get(name) is True and isinstance(config.objective.mini_batch_size, int):
            problems.append(f"{name}=True together with mini_batch_size: expected one of them; both save memory")
    if problems:
        raise ConfigError(
            f"{len(problems)} wrong argument(s) of finetune()",
            "callbacks, and names and values of SentenceTransformerTrainingArguments",
            "Correct them:",
            problems,
        )
    return UserArguments(config, tuple(callbacks or ()), kept)


def _callback_problems(callbacks: Any) -> list[str]:
    if callbacks is None:
        return []
    if not isinstance(callbacks, (list, tuple)):
        return [f"callbacks of type {type(callbacks).__name__}: expected transformers' TrainerCallbacks in a list"]
    return [
        f"callbacks with {one!r:.80}: expected a transformers.TrainerCallback"
        for one in callbacks
        if not isinstance(one, TrainerCallback) and not (isinstance(one, type) and issubclass(one, TrainerCallback))
    ]


@dataclass
class LoraTrainingArguments(SentenceTransformerTrainingArguments):
    """Training arguments with one device: transformers would use all GPUs (DataParallel), or the first."""

    lora_device: str | None = None

    @cached_property
    def _setup_devices(self) -> torch.device:
        device: torch.device = super()._setup_devices
        if distributed.world_size() == 1 and device.type == "cuda":
            self._n_gpu = 1
            wanted = torch.device(self.lora_device or device)
            if wanted.index is not None:
                torch.cuda.set_device(wanted)
                return wanted
        return device


def recomputes_activations(args: TrainingArguments) -> bool:
    """Whether activations are computed again in the backward pass, by transformers' older or newer name."""
    return bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", None))


def training_arguments(
    settings: TrainingSettings, run_dir: Path, batch_size: int, plan: TrainingPlan, train_kwargs: dict[str, Any]
) -> LoraTrainingArguments:
    """Arguments of the trainer; `train_kwargs`, the user's own, come last.

    Raises:
        ConfigError: sentence-transformers refuses the user's.
    """
    examples = len(plan.inputs["train_dataset"])
    values: dict[str, Any] = {
        "output_dir": str(run_dir),
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        **plan.arguments,
        "eval_strategy": "no",
        "save_strategy": "steps" if settings.save_checkpoints else "no",
        "save_steps": settings.checkpoint_save_steps,
        "save_total_limit": settings.checkpoint_save_total_limit or None,
        "logging_steps": max(1, min(10, examples * settings.epochs // batch_size // 10)),
        "disable_tqdm": not settings.show_progress_bar or not distributed.is_main(),
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": settings.device not in (None, "cpu"),
        "use_cpu": settings.device == "cpu",
    }
    try:
        return LoraTrainingArguments(lora_device=settings.device, **{**values, **train_kwargs})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"training arguments that sentence-transformers refuses ({error})",
            "names and values of SentenceTransformerTrainingArguments",
            "Correct what was passed to finetune(...).",
        ) from error
