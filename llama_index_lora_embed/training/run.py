"""One training run: base model and dataset in, model with its best adapter out."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from transformers import set_seed

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.errors import ConfigError, warn_user
from llama_index_lora_embed.training.batches import GroupBatchSampler, make_groups
from llama_index_lora_embed.training.lengths import Truncation, choose_length
from llama_index_lora_embed.training.lora import add_lora
from llama_index_lora_embed.training.objectives import column_prompts, training_inputs
from llama_index_lora_embed.training.trainer import (
    BestSoFar,
    Evaluate,
    LoraTrainer,
    latest_checkpoint,
    restore_weights,
)

logger = logging.getLogger(__name__)
_RUN_FILE = "run.json"


@dataclass(frozen=True)
class TrainingOutcome:
    """What training gives back.

    Attributes:
        best: Evaluations, and which step's weights the model now holds.
        truncation: How long texts are and what is cut.
        steps: Optimiser steps taken in all.
        train_seconds: Wall time of the steps; evaluations and loading are not in it.
        precision: "bf16" or "fp32".
    """

    best: BestSoFar
    truncation: Truncation
    steps: int
    train_seconds: float
    precision: str


def train(
    model: SentenceTransformer,
    dataset: EmbeddingQAFinetuneDataset,
    settings: TrainingSettings,
    *,
    lora_config: LoraConfig | None = None,
    loss: Any = None,
    use_all_docs: bool = False,
    evaluate: Evaluate | None = None,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    identity: dict[str, Any] | None = None,
    train_kwargs: dict[str, Any] | None = None,
    truncation: Truncation | None = None,
    best: BestSoFar | None = None,
) -> TrainingOutcome:
    """Train a LoRA on a model and leave the best weights in it.

    Args:
        model: Loaded base; gets an adapter named "default", unless it has one, which is trained on. Its
            `max_seq_length` is set.
        dataset: Checked training set.
        settings: Checked settings.
        lora_config: peft's own; None adapts all linear layers at the default rank.
        loss: None for masked in-batch negatives, else a sentence-transformers loss, or a callable that makes one
            from the model.
        use_all_docs: Train a question with all its relevant passages.
        evaluate: Judges the model; None keeps the last weights.
        checkpoint_dir: Where checkpoints go; None writes none.
        resume: Continue from the newest checkpoint, if there is one.
        identity: What a checkpoint must have in common with this run to be resumed from.
        train_kwargs: More `SentenceTransformerTrainingArguments`.
        truncation: What `set_length` returned, where it was called before.
        best: Evaluations to go on from, where the model was trained before; None starts with none.

    Raises:
        ConfigError: The length, the loss or the LoRA does not fit; or a checkpoint belongs to another run.
        DatasetError: Too few passages.
        NonFiniteLossError: The loss became NaN or infinite.
    """
    groups = make_groups(dataset, use_all_docs)
    truncation = truncation or set_length(model, dataset, settings, use_all_docs)
    best = best or BestSoFar(evaluate)
    set_seed(settings.seed)  # before the adapter's random initialisation
    if not getattr(model.transformers_model, "peft_config", None):
        add_lora(model, lora_config, settings)
    precision = resolve_precision(settings.precision, model.device)
    with ExitStack() as stack:
        run_dir = checkpoint_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = _prepare_run(run_dir, identity or {}, resume) if checkpoint_dir is not None else None
        trainer = LoraTrainer(
            best_so_far=best,
            evaluation_steps=settings.evaluation_steps,
            autocast_dtype=torch.bfloat16 if precision == "bf16" else None,
            warmup_ratio=None if "warmup_steps" in (train_kwargs or {}) else settings.warmup_ratio,
            model=model,
            **training_inputs(model, dataset, groups, loss, settings),
            args=_arguments(settings, run_dir, len(groups), None if loss is None else model, train_kwargs or {}),
        )
        if isinstance(loss, torch.nn.Module):
            # the user built it, and losses inside it, on a model of their own, before this one existed
            trainer.override_model_in_loss(loss, model)
        if checkpoint is None:
            best(model, 0)
        started, judged = time.perf_counter(), best.seconds
        trainer.train(resume_from_checkpoint=checkpoint)
        elapsed = time.perf_counter() - started - (best.seconds - judged)
    if best.weights is not None:
        restore_weights(model, best.weights)
    model.eval()
    _fill_in(best, model)
    return TrainingOutcome(best, truncation, int(trainer.state.global_step), elapsed, precision)


def set_length(
    model: SentenceTransformer, dataset: EmbeddingQAFinetuneDataset, settings: TrainingSettings, use_all_docs: bool
) -> Truncation:
    """Set the model's `max_seq_length` for the texts that it will be trained on; warn if some are cut.

    Raises:
        ConfigError: A length was asked for that the model's positions do not allow.
        DatasetError: Too few passages.
    """
    truncation = choose_length(
        model,
        dataset.queries.values(),
        (group.passage for group in make_groups(dataset, use_all_docs)),
        settings.length_coverage,
        settings.max_seq_length,
    )
    if truncation.cut_before or truncation.cut_after:
        warn_user(str(truncation))
    return truncation


def _fill_in(best: BestSoFar, model: SentenceTransformer) -> None:
    """Evaluate again what was evaluated before a resume: checkpoints keep the means, not each query's result."""
    if best.evaluate is None:
        return
    if best.base is None:
        model.disable_adapters()
        best.base = best.evaluate(model)
        model.enable_adapters()
    if best.best is None:
        best.best = best.evaluate(model)


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Take "bf16" where asked for, or on "auto" where the hardware computes it natively; else "fp32".

    Emulated bfloat16 is slower than float32, so a processor must have AVX512-BF16 or AMX.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    else:
        native = False
    return "bf16" if native else "fp32"


def _arguments(
    settings: TrainingSettings, run_dir: Path, groups: int, paired: SentenceTransformer | None, extra: dict[str, Any]
) -> SentenceTransformerTrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(run_dir),
        "per_device_train_batch_size": settings.batch_size,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "batch_sampler": GroupBatchSampler if paired is None else BatchSamplers.NO_DUPLICATES,
        "prompts": None if paired is None else column_prompts(paired),
        "eval_strategy": "no",
        "save_strategy": "steps" if settings.save_checkpoints else "no",
        "save_steps": settings.checkpoint_save_steps,
        "save_total_limit": settings.checkpoint_save_total_limit or None,
        "logging_steps": max(1, min(10, groups * settings.epochs // settings.batch_size // 10)),
        "disable_tqdm": not settings.show_progress_bar,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": settings.device not in (None, "cpu"),
        "use_cpu": settings.device == "cpu",
    }
    try:
        return SentenceTransformerTrainingArguments(**{**values, **extra})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"training arguments that sentence-transformers refuses ({error})",
            "names and values of SentenceTransformerTrainingArguments",
            "Correct what was passed to finetune(...).",
        ) from error


def _prepare_run(run_dir: Path, identity: dict[str, Any], resume: bool) -> str | None:
    """The checkpoint to resume from, or None; an older run's checkpoints are put aside, not mixed in.

    Raises:
        ConfigError: The checkpoints belong to a run with other data or settings.
    """
    checkpoint = latest_checkpoint(run_dir) if resume else None
    run_file = run_dir / _RUN_FILE
    if checkpoint is not None:
        recorded = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
        differences = [
            f"{name}: {recorded.get(name)!r} then, {identity.get(name)!r} now"
            for name in sorted(recorded.keys() | identity.keys())
            if recorded.get(name) != identity.get(name)
        ]
        if differences:
            raise ConfigError(
                f"a checkpoint of another run in {str(run_dir)!r}",
                "the same data and settings",
                "Restore them, or start without resume_from_checkpoint. Differences:",
                differences,
            )
        logger.info("resuming from %s", checkpoint)
        return checkpoint
    if resume:
        logger.warning("no checkpoint in %s to resume from; starting at step 0", run_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        aside = run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        os.rename(run_dir, aside)
        logger.warning("checkpoints of an earlier run were moved to %s", aside)
    run_dir.mkdir(parents=True, exist_ok=True)
    run_file.write_text(json.dumps(identity, indent=2), encoding="utf-8")
    return None
