"""A few steps of a run, tried and thrown away, to say how long all of it takes."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.data.training_data import TrainingData
from llama_index_lora_embed.models.kernels.precision import resolve_precision
from llama_index_lora_embed.models.kernels.step import training_kernels
from llama_index_lora_embed.training.arguments import training_arguments
from llama_index_lora_embed.training.auto_batch_size import LARGEST
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.examples import TrainingGroup
from llama_index_lora_embed.training.lora import add_lora, train_further
from llama_index_lora_embed.training.memory import bound_memory, highest_memory_mb
from llama_index_lora_embed.training.objectives.plan import training_plan
from llama_index_lora_embed.training.trainer import LoraTrainer


@dataclass(frozen=True)
class Trial:
    """What was tried.

    Attributes:
        steps: Steps of the whole run.
        steps_per_epoch: Of one pass over the data.
        batch_size: Passages or examples of a step.
        step_seconds: Mean wall time of a step.
        tried: Number of steps that were tried.
        counted: Of these, those that `step_seconds` is the mean of.
        precision: "bf16" or "fp32".
        memory_mb: Highest memory so far: of the device, or on a CPU of this process, its libraries included; None where
            that is not known.
    """

    steps: int
    steps_per_epoch: int
    batch_size: int
    step_seconds: float
    tried: int
    counted: int
    precision: str
    memory_mb: float | None


def try_steps(
    model: SentenceTransformer,
    dataset: TrainingData,
    groups: list[TrainingGroup],
    config: FinetuneConfig,
    *,
    seconds: float = 1.0,
    lora_config: Any = None,
) -> Trial:
    """Compute losses and gradients of a run's batches for about a second, at least twice; nothing is written or learnt.

    The optimiser is left out: its step over the few weights of a LoRA is short beside them.

    Args:
        model: Loaded starting model, on which `set_length` was called; it gets the run's LoRA.
        dataset: Checked training set.
        groups: Its groups; empty for labelled pairs.
        config: Of the run; its objective must need no teacher.
        seconds: Wall time of the steps.
        lora_config: peft's configuration.

    Raises:
        LoraEmbedError: As `train`.
    """
    settings = config.training
    if getattr(model.transformers_model, "peft_config", None):
        train_further(model)
    else:
        add_lora(model, lora_config, settings)
    precision = resolve_precision(settings.precision, model.device, model)
    plan = training_plan(model, dataset, groups, None, settings, config.objective)
    size = LARGEST if settings.batch_size == "auto" else settings.batch_size
    assert isinstance(size, int)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainer = LoraTrainer(
            selection=CheckpointSelection(None, "", settings.adapter_scale, None, None),
            precision=precision,
            base_dropout=settings.base_dropout,
            warmup_ratio=settings.warmup_ratio,
            run_record={},
            model=model,
            **plan.inputs,
            args=training_arguments(settings, Path(folder), size, plan, {}),
        )
        bound_memory(model, plan, settings.memory_mb)
        steps, loader = trainer.total_steps(), trainer.get_train_dataloader()
        stack.enter_context(training_kernels(model, settings))
        times: list[float] = []
        for batch in cycle(loader):
            started = time.perf_counter()
            prepared = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, prepared)
            loss.backward()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            if len(times) > 1 and sum(times) >= seconds:
                break
        model.zero_grad(set_to_none=True)
    # the first one compiles kernels, and on a GPU the second records CUDA graphs
    counted = (times[2:] if model.device.type == "cuda" else []) or times[1:]
    return Trial(
        steps=steps,
        steps_per_epoch=len(loader),
        batch_size=size,
        step_seconds=sum(counted) / len(counted),
        tried=len(times),
        counted=len(counted),
        precision=precision,
        memory_mb=highest_memory_mb(model.device),
    )
