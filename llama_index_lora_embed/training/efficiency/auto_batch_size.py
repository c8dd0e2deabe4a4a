"""`batch_size="auto"`: the largest step that the device's memory holds."""

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
_LARGEST = TrainingSettings().batch_size


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
    the objective allows it, because fewer passages in a batch are fewer negatives, and halved otherwise. Memory of the
    CPU is not tried: there the operating system kills a process instead of raising an error.

    Args:
        trainer_for: Makes a trainer for a size.
        gradcache: Whether the objective can be computed in chunks.

    Raises:
        DeviceMemoryError: Not even the smallest step fits.
    """
    assert isinstance(_LARGEST, int)
    sizes = [StepSize(_LARGEST), *_smaller(_LARGEST, gradcache)]
    for size in sizes:
        trainer = trainer_for(size)
        # all processes must use the same size, or they would wait for each other's steps
        if not _can_run_out(trainer.args.device) or not distributed.highest(int(not _fits(trainer))):
            logger.info("batch_size='auto' uses %s", size)
            return trainer
    raise DeviceMemoryError(
        f"too little memory on {trainer.args.device} for a step of {sizes[-1]}",
        "a step that fits",
        "Lower max_seq_length, use a smaller base, or free memory that other programs use.",
    )


def _smaller(largest: int, gradcache: bool) -> Iterator[StepSize]:
    size = largest // 2
    while size >= (1 if gradcache else 2):
        yield StepSize(largest, size) if gradcache else StepSize(size)
        size //= 2


def _can_run_out(device: torch.device) -> bool:
    return device.type != "cpu"


def _text_lengths(trainer: LoraTrainer) -> list[int]:
    """Characters in each example of the training set."""
    collator: Any = trainer.data_collator
    if isinstance(collator, GroupCollator):
        return [len(group.passage) for group in collator.groups]
    examples: Any = trainer.train_dataset
    return [sum(len(value) for value in example.values() if isinstance(value, str)) for example in examples]


def _fits(trainer: LoraTrainer) -> bool:
    """Whether a step over the longest texts fits; weights and random state are not changed."""
    examples: Any = trainer.train_dataset
    count = trainer.args.per_device_train_batch_size
    whole: Any = trainer.loss
    collator: Any = trainer.data_collator
    if isinstance(collator, GroupCollator) and distributed.world_size() > 1:
        count *= distributed.world_size()  # the collator takes this process's share of them
        trainer.loss = _OwnShare(whole)  # type: ignore[assignment]  # it can also be a dict of losses
    lengths = _text_lengths(trainer)
    longest = sorted(range(len(examples)), key=lambda i: -lengths[i])[:count]
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            batch = trainer._prepare_inputs(collator([examples[i] for i in longest]))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.loss = whole
        trainer.model.zero_grad(set_to_none=True)
        if isinstance(whole, nn.Module):  # a loss can have trained weights
            whole.zero_grad(set_to_none=True)
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


class _OwnShare(nn.Module):
    """The loss of a batch of all processes, with this process's embeddings in place of the others'.

    It takes as much memory as the real loss, which would wait for ever for a process that has run out of memory.

    Args:
        whole: The real loss.
    """

    def __init__(self, whole: MaskedInfoNCELoss) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, features: Any, labels: Tensor) -> Tensor:
        """The loss, see `MaskedInfoNCELoss.forward`."""
        chunks, (queries, passages) = list(features), labels.shape
        world = distributed.world_size()
        own = len(range(distributed.rank(), queries, world))

        def loss_of(embeddings: Tensor) -> Tensor:
            of_queries, of_passages = (part.repeat(world, 1) for part in (embeddings[:own], embeddings[own:]))
            missing = passages - len(of_passages)  # a process's share can be one smaller than another's
            of_passages = torch.cat([of_passages, of_passages[: max(0, missing)]])
            of_queries = torch.cat([of_queries, of_queries[: max(0, queries - len(of_queries))]])
            return self.whole.loss_of_embeddings(of_queries[:queries], of_passages[:passages], labels)

        model = self.whole.model
        return cached_loss(model, chunks, loss_of) if self.whole.cached else loss_of(embed_all(model, chunks))
