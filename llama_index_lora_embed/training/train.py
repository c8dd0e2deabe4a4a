"""One training run: a loaded model and a dataset in, the model with its best adapter weights out."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback, set_seed

from llama_index_lora_embed.config import FinetuneConfig, TrainingSettings
from llama_index_lora_embed.core.errors import warn_user
from llama_index_lora_embed.data.training_data import TrainingData
from llama_index_lora_embed.models.kernels.precision import resolve_precision, settle_precision
from llama_index_lora_embed.models.kernels.step import training_kernels
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.arguments import recomputes_activations, training_arguments
from llama_index_lora_embed.training.auto_batch_size import StepSize, largest_that_fits
from llama_index_lora_embed.training.callbacks import Evaluator, RunLog
from llama_index_lora_embed.training.checkpointing.checkpoints import LOG_NAME, open_run, read_record
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.checkpointing.signals import StopRequest
from llama_index_lora_embed.training.efficiency.frozen_layers import HiddenStateCache
from llama_index_lora_embed.training.examples import TrainingGroup
from llama_index_lora_embed.training.lengths import Truncation, choose_length
from llama_index_lora_embed.training.lora import (
    adapter_weights,
    add_lora,
    check_finite,
    check_scalable,
    train_further,
)
from llama_index_lora_embed.training.memory import bound_memory
from llama_index_lora_embed.training.objectives.frozen_passages import FrozenPassages
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from llama_index_lora_embed.training.objectives.plan import TrainingPlan, training_plan
from llama_index_lora_embed.training.teacher import Teacher
from llama_index_lora_embed.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)
_CACHE_TOLERANCE = 1e-4  # relative, in float32; other padding changes the last digits of sums
# where one of these differs from the checkpoint's, its evaluations cannot be compared with new ones
_EVALUATION_SETTINGS = {
    *("val_dataset", "best_metric", "selection_passages", "base", "continue_from", "quantized"),
    *("query_prompt", "passage_prompt", "pooling", "window", "max_seq_length", "precision", "adapter_scale"),
}


@dataclass(frozen=True)
class TrainingOutcome:
    """Result of a training run, after which the model has the selected weights.

    `train_seconds` are of wall time, without evaluations and loading. `precision` is "bf16" or "fp32".
    `teacher` has the name of the teacher and the digest of its scores, if there was one. `negatives` is "corpus" or
    "answered" where only queries were trained.
    """

    selection: CheckpointSelection
    truncation: Truncation
    steps: int
    train_seconds: float
    precision: str
    teacher: dict[str, str] | None = None
    negatives: str | None = None


def train(
    model: SentenceTransformer,
    dataset: TrainingData,
    groups: list[TrainingGroup],
    config: FinetuneConfig,
    run_dir: Path,
    *,
    selection: CheckpointSelection,
    truncation: Truncation,
    run_record: dict[str, Any],
    lora_config: LoraConfig | None = None,
    loss: Any = None,
    teacher: Teacher | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    train_kwargs: dict[str, Any] | None = None,
    passages: FrozenPassages | None = None,
) -> TrainingOutcome:
    """Train a LoRA on a model and leave the best weights in it.

    Ctrl-C and SIGTERM finish the step, save a checkpoint (even without `save_checkpoints`) and then have their usual
    effect.

    Args:
        model: Loaded base, on which `set_length` was called. It gets an adapter named "default"; if it has one, that is
            trained further.
        dataset: Checked training set.
        groups: Its groups; empty for labelled pairs.
        config: Of the run; its data, base and mining are not read.
        run_dir: Folder of the log and the checkpoints.
        selection: Evaluates; has earlier evaluations if the model was trained before.
        truncation: What `set_length` returned.
        run_record: What decides the result of the run; a checkpoint to resume from must have the same.
        lora_config: peft's configuration, instead of the settings' rank on all linear layers.
        loss: A sentence-transformers loss, or a callable that makes one from the model, instead of the objective's.
        teacher: Scores the passages, if the objective learns from one.
        callbacks: More transformers callbacks.
        train_kwargs: More `SentenceTransformerTrainingArguments`.
        passages: Vectors of the passages, where only queries are trained.

    Raises:
        ConfigError: The loss or the LoRA does not fit the base; or a checkpoint belongs to another run.
        DatasetError: There are no negatives.
        NonFiniteLossError: The loss became NaN or infinite.
        DeviceMemoryError: The device's memory does not hold a step.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    settings, output, extra = config.training, config.output, train_kwargs or {}
    set_seed(settings.seed)  # before the adapter's random initialisation
    if getattr(model.transformers_model, "peft_config", None):
        train_further(model)
    else:
        add_lora(model, lora_config, settings)
    start = adapter_weights(model)
    check_scalable(start, settings.adapter_scale)
    precision = resolve_precision(settings.precision, model.device, model)
    checkpointing = bool(extra.get("gradient_checkpointing") or extra.get("activation_checkpointing"))
    plan = training_plan(
        model,
        dataset,
        groups,
        loss,
        settings,
        config.objective,
        teacher=teacher,
        gradient_checkpointing=checkpointing,
        passages=passages,
    )
    training_arguments(settings, run_dir, 2, plan, extra)  # wrong ones raise before files are moved
    run_record = {**run_record, "precision": precision}
    if plan.teacher_scores is not None:
        run_record["teacher_scores"] = plan.teacher_scores
    if plan.negatives is not None:
        run_record["negatives"] = plan.negatives
    measured = {"precision"} if settings.precision == "auto" else set()
    (checkpoint, changed), precision = distributed.on_main(
        lambda: (
            open_run(run_dir, run_record, output.resume_from_checkpoint, output.allow_changes, measured),
            run_record["precision"],
        )
    )
    run_record["precision"] = precision
    if measured and model.device.type == "cpu":
        settle_precision(precision, model)
    evaluate_anew = bool(changed & _EVALUATION_SETTINGS)

    def trainer_for(step: StepSize) -> LoraTrainer:
        if step.mini_batch_size is not None:
            plan.use_gradcache(step.mini_batch_size)
        trainer = LoraTrainer(
            selection=selection,
            precision=precision,
            base_dropout=settings.base_dropout,
            warmup_ratio=None if "warmup_steps" in extra else settings.warmup_ratio,
            run_record=run_record,
            resolved={"step": asdict(step)},
            discard_evaluations=evaluate_anew,
            model=model,
            **plan.inputs,
            args=training_arguments(settings, run_dir, step.batch_size, plan, extra),
        )
        if isinstance(loss, torch.nn.Module):
            # the user built it, and losses inside it, on another model, before this one existed
            trainer.override_model_in_loss(loss, model)
        return trainer

    if settings.batch_size != "auto":
        trainer = trainer_for(StepSize(settings.batch_size))
    elif checkpoint is not None:
        trainer = trainer_for(StepSize(**read_record(checkpoint)["resolved"]["step"]))
    else:
        trainer = largest_that_fits(trainer_for, gradcache=plan.gradcache)
    stop = StopRequest()
    evaluator = Evaluator(trainer, settings.evaluation_steps, settings.early_stopping_patience, stop)
    for callback in (evaluator, RunLog(run_dir / LOG_NAME), *callbacks):
        trainer.add_callback(callback)
    selection.evaluate_installed(model)
    if checkpoint is None or evaluate_anew:
        selection.evaluate_step(model, 0)
    cache = _hidden_state_cache(model, settings, plan, trainer, run_dir)
    with ExitStack() as stack:
        if cache is not None:
            stack.callback(cache.store.close)
        processes = distributed.world_size()
        stack.enter_context(training_kernels(model, settings, recomputes=checkpointing, processes=processes))
        bound_memory(model, plan, settings.memory_mb)
        stack.enter_context(stop)
        done = False
        started, evaluating = time.perf_counter(), selection.seconds
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            done = evaluator.catch_up(trainer.state) or trainer.state.global_step >= trainer.total_steps()
        if not done:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        elapsed = time.perf_counter() - started - (selection.seconds - evaluating)
        check_finite(model, "after the last step")
        # even without save_checkpoints: the trained weights must survive an error before the adapter is written
        saved = trainer.save_now()
        if stop.requested():
            resume = f"its checkpoint is in {run_dir}; resume_from_checkpoint=True continues from it"
            outcome = resume if saved else "no checkpoint could be saved"
            logger.warning("training stopped at step %d; %s", trainer.state.global_step, outcome)
    stop.deliver()
    selection.restore_best(model, start)
    model.eval()
    steps, learnt = int(trainer.state.global_step), None
    learnt_from = passages.teacher if passages is not None else teacher
    if learnt_from is not None and plan.teacher_scores is not None:
        learnt = {"name": learnt_from.name, "scores": plan.teacher_scores}
    return TrainingOutcome(selection, truncation, steps, elapsed, precision, learnt, plan.negatives)


def set_length(
    model: SentenceTransformer, dataset: TrainingData, groups: list[TrainingGroup], settings: TrainingSettings
) -> Truncation:
    """Set the model's `max_seq_length` for the texts that it will be trained on; warn if some are truncated.

    Raises:
        ConfigError: The settings ask for a length that the model's positions do not allow.
    """
    wanted = settings.max_seq_length
    if dataset.kind == "queries":
        queries, passages = list(dataset.queries.values()), [group.passage for group in groups]
        if settings.tune == "query":  # passages keep their vectors, and so their length
            passages, wanted = [], model.max_seq_length
    elif dataset.symmetric:  # both texts get the passage prompt
        queries, passages = [], [*dataset.texts1, *dataset.texts2]
    else:
        queries, passages = dataset.texts1, dataset.texts2
    truncation = choose_length(model, queries, passages, settings.length_coverage, wanted)
    if truncation.cut_before or truncation.cut_after:
        warn_user(str(truncation))
    return truncation


def _hidden_state_cache(
    model: SentenceTransformer, settings: TrainingSettings, plan: TrainingPlan, trainer: LoraTrainer, run_dir: Path
) -> HiddenStateCache | None:
    """Give the loss a cache for the outputs of frozen layers, if there are some and more than one epoch needs them.

    There is none with gradient checkpointing, which runs layers again without the texts' ids, nor with the base's
    dropout, by which their outputs differ each time.
    """
    loss, args = plan.inputs["loss"], trainer.args
    if not isinstance(loss, MaskedInfoNCELoss) or not settings.frozen_cache_mb or settings.base_dropout:
        return None
    if model.device.type != "cpu":  # others compute the frozen layers sooner than they fetch their outputs
        return None
    if recomputes_activations(args):
        return None
    cache = HiddenStateCache.of(model, int(settings.frozen_cache_mb * 2**20), run_dir)
    if cache is None:
        return None
    steps_per_epoch = len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps
    if trainer.total_steps() <= steps_per_epoch:
        return None
    groups = len(plan.inputs["train_dataset"])
    batch = plan.inputs["data_collator"]([{"group": i} for i in range(min(groups, max(2, distributed.world_size())))])
    chunks, _ = trainer.collect_features(trainer._prepare_inputs(batch))
    model.eval()
    for chunk in (chunks[0], chunks[-1]):  # queries and passages
        if not cache.agrees(model, chunk, _CACHE_TOLERANCE):
            warn_user(
                "The frozen layers of this model cannot be computed apart from the others, so there is no hidden-state "
                "cache: with lora_layers, a step takes as long as one that trains all layers."
            )
            return None
    cache.store.close()  # the states of the trial are float32
    loss.hidden_state_cache = cache
    return cache
