"""`batch_size="auto"`: the largest step that the device's memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llama_index_lora_embed.core.errors import DeviceMemoryError
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.objectives.collator import GroupCollator

if TYPE_CHECKING:
    from llama_index_lora_embed.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)
LARGEST = 32
"""Passages in the largest step that is tried."""


@dataclass(frozen=True)
class StepSize:
    """Size of a training step.

    Attributes:
        batch_size: Passages with their queries, or examples, in each process.
        mini_batch_size: Texts encoded at once (GradCache); None leaves it to the objective.
    """

    batch_size: int
    mini_batch_size: int | None = None


def largest_that_fits(trainer_for: Callable[[StepSize], LoraTrainer], gradcache: bool) -> LoraTrainer:
    """A trainer whose largest step fits the memory of every process's device.

    It tries a forward and a backward pass over the longest texts. A batch that does not fit is computed in chunks where
    the objective allows it (`gradcache`), because fewer passages in a batch are fewer negatives, and halved otherwise.
    Memory of the CPU is not tried: there the operating system kills a process instead of raising an error.

    Raises:
        DeviceMemoryError: Not even the smallest step fits.
    """
    sizes, size = [StepSize(LARGEST)], LARGEST // 2
    while size >= (1 if gradcache else 2):
        sizes.append(StepSize(LARGEST, size) if gradcache else StepSize(size))
        size //= 2
    for step in sizes:
        trainer = trainer_for(step)
        # all processes must use the same size, or they would wait for each other's steps
        if not _can_run_out(trainer.args.device) or not distributed.highest(int(not _fits(trainer))):
            logger.info("batch_size='auto' uses %s", step)
            return trainer
    raise DeviceMemoryError(
        f"too little memory on {trainer.args.device} for a step of {sizes[-1]}",
        "a step that fits",
        "Lower max_seq_length, use a smaller base, or free memory that other programs use.",
    )


def _can_run_out(device: torch.device) -> bool:
    return device.type != "cpu"


def _fits(trainer: LoraTrainer) -> bool:
    """Whether a step over the longest texts fits; weights and random state are not changed."""
    examples: Any = trainer.train_dataset
    collator: Any = trainer.data_collator
    loss: Any = trainer.loss
    count = trainer.args.per_device_train_batch_size
    if isinstance(collator, GroupCollator):
        lengths = [len(group.passage) for group in collator.groups]
        count *= distributed.world_size()  # the collator takes this process's share of them
        loss.alone = True
    else:
        lengths = [sum(len(value) for value in one.values() if isinstance(value, str)) for one in examples]
    longest = sorted(range(len(examples)), key=lambda i: -lengths[i])[:count]
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            batch = trainer._prepare_inputs(collator([examples[i] for i in longest]))
            with trainer.compute_loss_context_manager():
                value = trainer.compute_loss(trainer.model, batch)
            value.backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.model.zero_grad(set_to_none=True)
        if isinstance(collator, GroupCollator):
            loss.alone = False
        if isinstance(loss, nn.Module):  # it can have trained weights; it can also be a dict of losses
            loss.zero_grad(set_to_none=True)
        if devices:
            torch.cuda.empty_cache()
    return True
