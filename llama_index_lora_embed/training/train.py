"""One training run: base model and dataset in, model with its best adapter out."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback, set_seed

from llama_index_lora_embed.config import ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError, warn_user
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.data.split import Trainable
from llama_index_lora_embed.models.kernels.attention import blocked_attention
from llama_index_lora_embed.models.kernels.lora import fused_lora
from llama_index_lora_embed.models.kernels.precision import resolve_precision
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.callbacks import Evaluator, RunLog
from llama_index_lora_embed.training.checkpointing.checkpoints import LOG_NAME, open_run, read_record
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.checkpointing.signals import StopRequest
from llama_index_lora_embed.training.efficiency.auto_batch_size import StepSize, largest_that_fits
from llama_index_lora_embed.training.efficiency.frozen_layers import HiddenStateCache
from llama_index_lora_embed.training.lengths import Truncation, choose_length
from llama_index_lora_embed.training.lora import adapter_weights, add_lora, check_finite, restore_weights, train_further
from llama_index_lora_embed.training.objectives.collator import make_groups
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from llama_index_lora_embed.training.objectives.plan import TrainingPlan, training_plan
from llama_index_lora_embed.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)
_PREFIX_TOLERANCE = 1e-4  # relative, in float32; other lengths of padding change sums in their last digits
# where one of these differs, evaluations of before cannot be compared with those of now
_DECIDE_EVALUATIONS = {
    *("val_dataset", "best_metric", "base", "continue_from", "quantized"),
    *("query_prompt", "passage_prompt", "pooling", "window", "max_seq_length", "precision"),
}


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

    best: CheckpointSelection
    truncation: Truncation
    steps: int
    train_seconds: float
    precision: str


def train(
    model: SentenceTransformer,
    dataset: Trainable,
    settings: TrainingSettings,
    run_dir: Path,
    *,
    best: CheckpointSelection,
    lora_config: LoraConfig | None = None,
    loss: Any = None,
    objective: ObjectiveSettings | None = None,
    use_all_docs: bool = False,
    resume: bool = False,
    allow_changes: Collection[str] = (),
    recorded: dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    train_kwargs: dict[str, Any] | None = None,
    truncation: Truncation | None = None,
) -> TrainingOutcome:
    """Train a LoRA on a model and leave the best weights in it.

    Ctrl-C and SIGTERM finish the step, save a checkpoint (whether or not the settings ask for checkpoints) and then
    do what they always do.

    Args:
        model: Loaded base; gets an adapter named "default", unless it has one, which is trained on. Its
            `max_seq_length` is set.
        dataset: Checked training set.
        settings: Checked settings.
        run_dir: Where the log and the checkpoints go.
        best: Evaluates; with earlier evaluations in it where the model was trained before.
        lora_config: peft's own; None adapts all linear layers at the default rank.
        loss: None for the objective's, else a sentence-transformers loss, or a callable that makes one from the model.
        objective: What is trained where `loss` is None; None for the default.
        use_all_docs: Train a question with all its relevant passages.
        resume: Continue from the newest checkpoint, if there is one.
        allow_changes: What may differ from the checkpoint's `recorded`.
        recorded: What a checkpoint must have in common with this run to be resumed from.
        callbacks: More of transformers' callbacks.
        train_kwargs: More `SentenceTransformerTrainingArguments`.
        truncation: What `set_length` returned, where it was called before.

    Raises:
        ConfigError: The length, the loss or the LoRA does not fit; or a checkpoint belongs to another run.
        DatasetError: Too few passages.
        NonFiniteLossError: The loss became NaN or infinite.
        DeviceMemoryError: The device's memory does not hold a step.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    groups = make_groups(dataset, use_all_docs) if isinstance(dataset, EmbeddingQAFinetuneDataset) else []
    truncation = truncation or set_length(model, dataset, settings, use_all_docs)
    set_seed(settings.seed)  # before the adapter's random initialisation
    if getattr(model.transformers_model, "peft_config", None):
        train_further(model)
    else:
        add_lora(model, lora_config, settings)
    start = adapter_weights(model)
    precision = resolve_precision(settings.precision, model.device)
    extra = train_kwargs or {}
    plan = training_plan(
        model,
        dataset,
        groups,
        loss,
        settings,
        objective,
        gradient_checkpointing=bool(extra.get("gradient_checkpointing") or extra.get("activation_checkpointing")),
    )
    _arguments(settings, run_dir, StepSize(2), plan, extra)  # what is wrong with them shows before files are moved
    recorded = {**(recorded or {}), "precision": precision}
    checkpoint, changed = distributed.on_main(lambda: open_run(run_dir, recorded, resume, allow_changes))
    others = bool(changed & _DECIDE_EVALUATIONS)

    def trainer_for(step: StepSize) -> LoraTrainer:
        if step.pieces is not None:
            plan.in_pieces(step.pieces)
        return LoraTrainer(
            best_so_far=best,
            precision=precision,
            base_dropout=settings.base_dropout,
            warmup_ratio=None if "warmup_steps" in extra else settings.warmup_ratio,
            recorded=recorded,
            found={"step": asdict(step)},
            evaluations_forgotten=others,
            model=model,
            **plan.inputs,
            args=_arguments(settings, run_dir, step, plan, extra),
        )

    if settings.batch_size != "auto":
        trainer = trainer_for(StepSize(settings.batch_size))
    elif checkpoint is not None:
        trainer = trainer_for(StepSize(**read_record(checkpoint)["found"]["step"]))
    else:
        trainer = largest_that_fits(trainer_for, pieces=plan.divisible)
    if isinstance(loss, torch.nn.Module):
        # the user built it, and losses inside it, on a model of their own, before this one existed
        trainer.override_model_in_loss(loss, model)
    stop = StopRequest()
    evaluator = Evaluator(trainer, settings.evaluation_steps, settings.early_stopping_patience, stop)
    for callback in (evaluator, RunLog(run_dir / LOG_NAME), *callbacks):
        trainer.add_callback(callback)
    if checkpoint is None or others:
        best(model, 0)
    prefix = _frozen_prefix(model, settings, plan, trainer, run_dir)
    with ExitStack() as stack:
        if prefix is not None:
            stack.callback(prefix.states.close)
        if settings.fused_lora:
            stack.enter_context(fused_lora(model))
        if settings.fused_attention:
            stack.enter_context(blocked_attention(model))
        stack.enter_context(stop)
        done = False
        started, judged = time.perf_counter(), best.seconds
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            done = evaluator.catch_up(trainer.state) or trainer.state.global_step >= trainer.steps_in_all()
        if not done:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        elapsed = time.perf_counter() - started - (best.seconds - judged)
        check_finite(model, "after the last step")
        # also where none was asked for: what was trained must outlive whatever comes before the adapter is written
        saved = trainer.save_now()
        if stop.asked():
            where = (
                f"its checkpoint is in {run_dir}, and finetune() goes on from there with resume_from_checkpoint=True"
            )
            logger.warning("stopped at step %d; %s", trainer.state.global_step, where if saved else "it was not saved")
    stop.act()
    steps = int(trainer.state.global_step)
    restore_best(best, model, start)
    model.eval()
    return TrainingOutcome(best, truncation, steps, elapsed, precision)


def set_length(
    model: SentenceTransformer, dataset: Trainable, settings: TrainingSettings, use_all_docs: bool
) -> Truncation:
    """Set the model's `max_seq_length` for the texts that it will be trained on; warn if some are cut.

    Raises:
        ConfigError: A length was asked for that the model's positions do not allow.
        DatasetError: Too few passages.
    """
    if isinstance(dataset, LabelledPairs):
        queries, passages = dataset.texts1, dataset.texts2
        if dataset.symmetric:  # both stand under the passages' prompt
            queries, passages = [], [*dataset.texts1, *dataset.texts2]
    else:
        queries = list(dataset.queries.values())
        passages = [group.passage for group in make_groups(dataset, use_all_docs)]
    truncation = choose_length(model, queries, passages, settings.length_coverage, settings.max_seq_length)
    if truncation.cut_before or truncation.cut_after:
        warn_user(str(truncation))
    return truncation


def _frozen_prefix(
    model: SentenceTransformer, settings: TrainingSettings, plan: TrainingPlan, trainer: LoraTrainer, run_dir: Path
) -> HiddenStateCache | None:
    """Have the loss keep the outputs of frozen layers, if there are some below and more than one epoch needs them.

    Not together with gradient checkpointing, which may run the layers again when nothing knows their texts any more,
    nor with the base's dropout, by which they put out something else each time.
    """
    loss, args = plan.inputs["loss"], trainer.args
    if not isinstance(loss, MaskedInfoNCELoss) or not settings.frozen_cache_mb or settings.base_dropout:
        return None
    if args.gradient_checkpointing or args.activation_checkpointing:
        return None
    prefix = HiddenStateCache.of(model, int(settings.frozen_cache_mb * 2**20), run_dir)
    if prefix is None:
        return None
    steps = len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps  # in an epoch
    if trainer.steps_in_all() <= steps:
        return None
    groups = len(plan.inputs["train_dataset"])
    batch = plan.inputs["data_collator"]([{"group": i} for i in range(min(groups, max(2, distributed.world_size())))])
    chunks, _ = trainer.collect_features(trainer._prepare_inputs(batch))
    model.eval()
    for chunk in (chunks[0], chunks[-1]):  # questions and passages
        if not prefix.agrees(model, chunk, _PREFIX_TOLERANCE):
            warn_user(
                "This model's frozen layers cannot be computed apart from the others: lora_layers trains the upper "
                "ones alone, in the time of a whole pass for each step."
            )
            return None
    prefix.states.close()  # what was tried was float32
    loss.prefix = prefix
    return prefix


def restore_best(best: CheckpointSelection, model: SentenceTransformer, start: dict[str, torch.Tensor]) -> None:
    """Leave the best weights in the model.

    What was evaluated before a resume is evaluated again: checkpoints keep the means, not each query's result.
    """
    if best.evaluate is None:
        return
    if best.base is None:
        restore_weights(model, start)
        best.base = best.judge(model)
    if best.weights is not None:
        restore_weights(model, best.weights)
    if best.best is None:
        best.best = best.base if best.best_step == 0 else best.judge(model)


@dataclass
class LoraTrainingArguments(SentenceTransformerTrainingArguments):
    """The arguments, with one device: transformers would take all GPUs that it sees (DataParallel), or the first."""

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


def _arguments(
    settings: TrainingSettings, run_dir: Path, step: StepSize, plan: TrainingPlan, extra: dict[str, Any]
) -> LoraTrainingArguments:
    rows, batch_size = len(plan.inputs["train_dataset"]), step.rows
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
        "logging_steps": max(1, min(10, rows * settings.epochs // batch_size // 10)),
        "disable_tqdm": not settings.show_progress_bar or not distributed.is_main(),
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": settings.device not in (None, "cpu"),
        "use_cpu": settings.device == "cpu",
    }
    try:
        return LoraTrainingArguments(lora_device=settings.device, **{**values, **extra})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"training arguments that sentence-transformers refuses ({error})",
            "names and values of SentenceTransformerTrainingArguments",
            "Correct what was passed to finetune(...).",
        ) from error
