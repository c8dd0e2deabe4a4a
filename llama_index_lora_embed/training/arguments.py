"""What a user passes to `finetune(...)`: callbacks and training arguments, checked before anything is loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainerCallback, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from llama_index_lora_embed.config import IN_BATCH, ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError

# sentence-transformers' name to what the engine has for it
_THE_ENGINES = {
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
    "eval_on_start": "nothing, because step 0 is always evaluated",
    "do_eval": "val_fraction and val_dataset",
    "metric_for_best_model": "best_metric",
    "greater_is_better": "best_metric",
    "load_best_model_at_end": "best_metric, by which the best step is always kept",
    "save_strategy": "save_checkpoints",
    "save_steps": "checkpoint_save_steps",
    "save_total_limit": "checkpoint_save_total_limit",
    "resume_from_checkpoint": "resume_from_checkpoint",
}
_IN_BATCH = {"batch_sampler": "objective, whose batches hold no false negatives"}
# these reach beyond the arguments themselves as soon as they are made
_NOT_TRIED = (
    *("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config"),
    *("tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
)
# integrations that are not installed raise these
_REFUSALS = (TypeError, ValueError, ImportError, RuntimeError, AttributeError, KeyError)


@dataclass(frozen=True)
class UserArguments:
    """What can be used of them.

    Attributes:
        settings: The engine's, with `warmup_ratio` if it was among them.
        callbacks: Transformers' callbacks.
        train_kwargs: All others.
    """

    settings: TrainingSettings
    callbacks: tuple[TrainerCallback, ...]
    train_kwargs: dict[str, Any]


def check_user_arguments(
    settings: TrainingSettings,
    callbacks: Any,
    train_kwargs: dict[str, Any],
    objective: ObjectiveSettings | None = None,
    loss: Any = None,
    pairs: bool = False,
) -> UserArguments:
    """The arguments, if they can be used.

    Args:
        settings: Of the engine.
        callbacks: Transformers' callbacks; None for none.
        train_kwargs: sentence-transformers' training arguments.
        objective: What is trained; None for the default.
        loss: The user's own, which is trained instead.
        pairs: Whether labelled pairs are trained on.

    Raises:
        ConfigError: Naming all that cannot be used.
    """
    objective = objective or ObjectiveSettings()
    in_batch = loss is None and objective.name_for(pairs) in IN_BATCH
    problems = _problems_of_callbacks(callbacks)
    kept = dict(train_kwargs)
    if "warmup_ratio" in kept:
        if kept.get("warmup_steps"):
            problems.append(f"warmup_ratio together with warmup_steps={kept['warmup_steps']!r}: expected one of them")
        settings = replace(settings, warmup_ratio=kept.pop("warmup_ratio"))
        problems += settings.problems()  # of the engine's own there were none
    the_engines = _THE_ENGINES | (_IN_BATCH if in_batch else {})
    known = {field.name for field in fields(SentenceTransformerTrainingArguments) if field.init}
    for name, value in kept.items():
        if name in the_engines:
            problems.append(f"{name}={value!r}: expected the engine's own argument for it, {the_engines[name]}")
        elif name not in known:
            problems.append(f"{name}={value!r}: expected a training argument of sentence-transformers")
    tried = {n: v for n, v in kept.items() if n in known and n not in the_engines and n not in _NOT_TRIED}
    problems += _problems_of_values(tried, isinstance(objective.mini_batch_size, int)) or _refusals(tried)
    if problems:
        raise ConfigError(
            f"{len(problems)} wrong argument(s) of finetune()",
            "callbacks, and names and values of SentenceTransformerTrainingArguments",
            "Correct them:",
            problems,
        )
    return UserArguments(settings, tuple(callbacks or ()), kept)


def _problems_of_callbacks(callbacks: Any) -> list[str]:
    if callbacks is None:
        return []
    if not isinstance(callbacks, (list, tuple)):
        return [f"callbacks of type {type(callbacks).__name__}: expected transformers' TrainerCallbacks in a list"]
    return [
        f"callbacks with {one!r:.80}: expected a transformers.TrainerCallback"
        for one in callbacks
        if not isinstance(one, TrainerCallback) and not (isinstance(one, type) and issubclass(one, TrainerCallback))
    ]


def _problems_of_values(values: dict[str, Any], in_pieces: bool) -> list[str]:
    """What transformers would find out in the middle of training, or not at all."""
    found = []

    def whole(name: str, least: int, also: tuple[int, ...] = ()) -> None:
        value = values.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or (value < least and value not in also):
            found.append(f"{name}={value!r}: expected a whole number of at least {least}")

    whole("gradient_accumulation_steps", 1)
    whole("max_steps", 1, also=(-1,))
    whole("dataloader_num_workers", 0)
    for name in ("weight_decay", "max_grad_norm"):
        value = values.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            found.append(f"{name}={value!r}: expected a number of at least 0")
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        value = values.get(name)
        if not isinstance(value, (bool, type(None))):
            found.append(f"{name}={value!r}: expected True or False")
        elif value and in_pieces:
            found.append(f"{name}=True together with mini_batch_size: expected one of them; both save the same memory")
    return found


def _refusals(values: dict[str, Any]) -> list[str]:
    """What sentence-transformers refuses: each argument that it does not take by itself, or else all together."""
    if (together := _refusal(values)) is None:
        return []
    alone = {name: _refusal({name: value}) for name, value in values.items()}
    found = [f"{name}={values[name]!r}: {refusal}" for name, refusal in alone.items() if refusal is not None]
    return found or [f"{', '.join(values)} together: {together}"]


def _refusal(values: dict[str, Any]) -> str | None:
    """What sentence-transformers and transformers have against these arguments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real arguments will warn
            arguments: Any = _Trial(**{"output_dir": "unused", "report_to": "none", **values})
            report: Any = get_reporting_integration_callbacks
            for callback in report(arguments.report_to):
                callback()  # raises where the service's package is not installed
            get_scheduler(
                arguments.lr_scheduler_type,
                optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
                num_warmup_steps=1,
                num_training_steps=1_000_000,
                scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
            )
    except _REFUSALS as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


@dataclass
class _Trial(SentenceTransformerTrainingArguments):
    """Arguments that touch no device: transformers would settle the device of all that comes later."""

    use_cpu: bool = True

    @cached_property
    def _setup_devices(self) -> torch.device:
        self._n_gpu = 0
        self.distributed_state = None
        return torch.device("cpu")
