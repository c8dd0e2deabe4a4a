"""How large a step the device's memory holds: `batch_size="auto"`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.errors import DeviceMemoryError

if TYPE_CHECKING:
    from llama_index_lora_embed.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)
_FULL = TrainingSettings().batch_size


@dataclass(frozen=True)
class StepSize:
    """How many rows a step has, and how it is computed.

    Attributes:
        rows: Passages with their questions, or rows of texts.
        pieces: Texts encoded at once (GradCache); None leaves it to the objective.
    """

    rows: int
    pieces: int | None = None


def largest_that_fits(trainer_for: Callable[[StepSize], LoraTrainer], pieces: bool) -> LoraTrainer:
    """A trainer whose largest step the device's memory holds.

    It tries a forward and a backward pass over the longest texts. A batch that does not fit is computed in pieces
    where the objective can be, because fewer passages in a batch are fewer negatives, and halved elsewhere. The
    processor's memory is not tried: it ends in the operating system's killing somebody, not in an error.

    Args:
        trainer_for: Makes a trainer for a size.
        pieces: Whether the objective can be computed in pieces.

    Raises:
        DeviceMemoryError: Not even the smallest step fits.
    """
    assert isinstance(_FULL, int)
    sizes = [StepSize(_FULL), *_smaller(_FULL, pieces)]
    for size in sizes:
        trainer = trainer_for(size)
        if not _can_run_out(trainer.args.device) or _fits(trainer):
            logger.info("batch_size='auto' takes %s", size)
            return trainer
    raise DeviceMemoryError(
        f"too little memory on {trainer.args.device} for a step of {sizes[-1]}",
        "a step that fits",
        "Shorten the texts with max_seq_length, take a smaller base, or free memory that other programs hold.",
    )


def _smaller(full: int, pieces: bool) -> Iterator[StepSize]:
    size = full // 2
    while size >= (1 if pieces else 2):
        yield StepSize(full, size) if pieces else StepSize(size)
        size //= 2


def _can_run_out(device: torch.device) -> bool:
    return device.type != "cpu"


def _fits(trainer: LoraTrainer) -> bool:
    """Whether a step over the longest texts can be computed; weights and random state stay as they are."""
    rows: Any = trainer.train_dataset
    lengths = trainer.text_lengths()
    longest = sorted(range(len(rows)), key=lambda i: -lengths[i])[: trainer.args.per_device_train_batch_size]
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in longest]))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.model.zero_grad(set_to_none=True)
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def out_of_memory(batch_size: int, tokens: int, error: BaseException) -> DeviceMemoryError:
    """What to do about a device whose memory does not hold a step.

    Args:
        batch_size: Passages (or rows) in the step.
        tokens: Of its longest text.
        error: What torch raised.
    """
    smaller, chunk = max(2, batch_size // 2), max(1, min(8, batch_size // 4))
    return DeviceMemoryError(
        f"too little device memory for a step of batch_size={batch_size} with texts of up to {tokens} tokens "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})",
        "a step that fits",
        f"Keep the batch and compute it piece by piece (GradCache): objective=ObjectiveSettings(mini_batch_size="
        f"{chunk}), smaller if need be; or batch_size={smaller}; or max_seq_length={max(64, tokens // 2)}; or let "
        "batch_size='auto' find what fits. Other programs on the device count too.",
    )
