"""How large a step the device's memory holds, and what to do where it does not: `batch_size="auto"`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.core.errors import DeviceMemoryError
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.efficiency.gradcache import cached_loss, embed_all
from llama_index_lora_embed.training.objectives.collator import GroupCollator
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss

if TYPE_CHECKING:
    from llama_index_lora_embed.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)
_FULL = TrainingSettings().batch_size
_SHORT = 64  # tokens below which texts are not worth cutting further


@dataclass(frozen=True)
class StepSize:
    """How many rows a step has, and how it is computed.

    Attributes:
        rows: Passages with their questions, or rows of texts; of each process.
        pieces: Texts encoded at once (GradCache); None leaves it to the objective.
    """

    rows: int
    pieces: int | None = None


def largest_that_fits(trainer_for: Callable[[StepSize], LoraTrainer], pieces: bool) -> LoraTrainer:
    """A trainer whose largest step the memory of every process's device holds.

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
        # all processes take the same size, or they would wait for each other's steps
        if not _can_run_out(trainer.args.device) or not distributed.highest(int(not _fits(trainer))):
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


def text_lengths(trainer: LoraTrainer) -> list[int]:
    """Characters in each row of the training set."""
    collator: Any = trainer.data_collator
    if isinstance(collator, GroupCollator):
        return [len(group.passage) for group in collator.groups]
    rows: Any = trainer.train_dataset
    return [sum(len(value) for value in row.values() if isinstance(value, str)) for row in rows]


def _fits(trainer: LoraTrainer) -> bool:
    """Whether a step over the longest texts can be computed; weights and random state stay as they are."""
    rows: Any = trainer.train_dataset
    count = trainer.args.per_device_train_batch_size
    whole: Any = trainer.loss
    collator: Any = trainer.data_collator
    if isinstance(collator, GroupCollator) and distributed.world_size() > 1:
        count *= distributed.world_size()  # of which the collator takes this process's share
        trainer.loss = _OwnShare(whole)  # type: ignore[assignment]  # it may also be a dict of losses
    lengths = text_lengths(trainer)
    longest = sorted(range(len(rows)), key=lambda i: -lengths[i])[:count]
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            batch = trainer._prepare_inputs(collator([rows[i] for i in longest]))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.loss = whole
        trainer.model.zero_grad(set_to_none=True)
        if isinstance(whole, nn.Module):  # it can have weights of its own
            whole.zero_grad(set_to_none=True)
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


class _OwnShare(nn.Module):
    """The loss of a batch of all processes, with this one's vectors in the place of the others'.

    It takes the memory of the real one. That one waits for the others' vectors, for ever where one of them has run out
    of memory.

    Args:
        whole: The real one.
    """

    def __init__(self, whole: MaskedInfoNCELoss) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, features: Any, labels: Tensor) -> Tensor:
        """As of the loss itself."""
        chunks, (questions, passages) = list(features), labels.shape
        world = distributed.world_size()
        own = len(range(distributed.rank(), questions, world))

        def loss_of(vectors: Tensor) -> Tensor:
            queries, documents = (part.repeat(world, 1) for part in (vectors[:own], vectors[own:]))
            missing = passages - len(documents)  # a process can have one fewer than its share
            documents = torch.cat([documents, documents[: max(0, missing)]])
            queries = torch.cat([queries, queries[: max(0, questions - len(queries))]])
            return self.whole._loss(queries[:questions], documents[:passages], labels)

        model = self.whole.model
        return cached_loss(model, chunks, loss_of) if self.whole.cached else loss_of(embed_all(model, chunks))


def out_of_memory(
    batch_size: int,
    tokens: int,
    error: BaseException,
    *,
    pieces: int | None = None,
    can_piece: bool = True,
) -> DeviceMemoryError:
    """What to do about a device whose memory does not hold a step; nothing is advised that cannot be done.

    Args:
        batch_size: Passages (or rows) in the step.
        tokens: Of its longest text.
        error: What torch raised.
        pieces: Texts that were encoded at once (GradCache); None if the batch was encoded as a whole.
        can_piece: Whether the objective can be computed in pieces.
    """
    advice = []
    if can_piece and pieces is None:
        chunk = max(1, min(8, batch_size // 4))
        advice.append(
            f"keep the batch and compute it piece by piece (GradCache), objective=ObjectiveSettings(mini_batch_size="
            f"{chunk}), smaller if need be"
        )
    elif can_piece and pieces is not None and pieces > 1:
        advice.append(f"lower mini_batch_size from {pieces} to {pieces // 2}, smaller if need be")
    if batch_size >= 4:  # a batch of one has no negatives
        advice.append(f"batch_size={batch_size // 2}")
    if tokens > _SHORT:
        advice.append(f"max_seq_length={max(_SHORT, tokens // 2)}")
    advice += [
        "batch_size='auto', if it is not that already",
        "a smaller base",
        "or free what other programs hold of the device",
    ]
    return DeviceMemoryError(
        f"too little device memory for a step of batch_size={batch_size} with texts of up to {tokens} tokens "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})",
        "a step that fits",
        f"One of these helps: {'; '.join(advice)}.",
    )
