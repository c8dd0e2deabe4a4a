"""Order of batches: it depends on seed and epoch alone, so a resumed run sees what an uninterrupted one would."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives


class GroupBatchSampler(DefaultBatchSampler):
    """Shuffles the groups and splits them into batches of nearly equal size.

    Every batch has at least two passages, because one passage would have no negatives, and at least one per process if
    there are so many; therefore batches of 2 can become 3. Every process gets the same batches, so `batch_size` is that
    of all of them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = len(self.sampler)  # type: ignore[arg-type]  # torch's BatchSampler holds the dataset as .sampler
        self.min_size = max(2, distributed.world_size())

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one epoch, as indices."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        batches = len(self)
        for number in range(batches):
            yield order[number * self.count // batches : (number + 1) * self.count // batches]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return max(1, min(math.ceil(self.count / self.batch_size), self.count // self.min_size))


class ExampleTraits(NamedTuple):
    """Which examples cannot share a batch, as numbers.

    Attributes:
        has: For each example, the traits of its passages.
        avoids: For each example, the traits that make a passage of another example a false negative.
    """

    has: list[tuple[int, ...]]
    avoids: list[tuple[int, ...]]

    @classmethod
    def of(cls, examples: Sequence[tuple[str, Sequence[str]]], false_negatives: FalseNegatives) -> ExampleTraits:
        """Traits of examples, each a query id and the ids of its passages, hard negatives included."""
        numbers: dict[tuple[str, str], int] = {}
        traits: dict[str, tuple[int, ...]] = {}
        has, avoids = [], []
        for query_id, passage_ids in examples:
            for passage_id in passage_ids:
                if passage_id not in traits:
                    keys = false_negatives.traits(passage_id)
                    traits[passage_id] = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
            has.append(tuple(number for i in passage_ids for number in traits[i]))
            avoids.append(tuple(numbers.setdefault(key, len(numbers)) for key in false_negatives.blocked(query_id)))
        return cls(has, avoids)


class ExampleBatchSampler(DefaultBatchSampler):
    """Shuffles examples into batches in which no passage is a false negative of another example's query.

    It is for losses that use the other examples of a batch as negatives. Each epoch holds every example, in the same
    number of batches. Batches are full until only examples are left that cannot share one; where many examples have
    the same passage, that can be many small batches. Each batch looks at a few more examples than it holds, so the
    time grows linearly.

    Each of `world` processes gets the batches `rank`, `rank + world`, ...; the first ones are repeated until all
    processes have equally many. `traits` say which examples cannot share a batch; they are None for losses that do not
    compare the examples of a batch. Other arguments are those of `DefaultBatchSampler`; `drop_last` is ignored.
    """

    def __init__(
        self, *args: Any, traits: ExampleTraits | None = None, rank: int = 0, world: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.traits = traits
        self.rank = rank
        self.world = world
        self.count = len(self.sampler)  # type: ignore[arg-type]  # torch's BatchSampler holds the dataset as .sampler
        # epochs can need different numbers of batches, but the learning-rate schedule is made for one number
        self.spare = self._fill_batches(self._order(-1, self.count))
        needed = len(self.spare)
        more = 0 if needed == math.ceil(self.count / self.batch_size) else max(1, needed // 50)
        self.batches = min(self.count, needed + more)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's batches of one epoch, as indices."""
        batches = self._fill_batches(self._order(self.epoch, self.count))
        if len(batches) > self.batches:
            batches = [self.spare[i] for i in self._order(self.epoch, len(self.spare))]
        while len(batches) < self.batches:
            longest = max(range(len(batches)), key=lambda i: len(batches[i]))
            half = len(batches[longest]) // 2
            batches[longest : longest + 1] = [batches[longest][:half], batches[longest][half:]]
        batches += batches[: -len(batches) % self.world]
        yield from batches[self.rank :: self.world]

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return math.ceil(self.batches / self.world)

    def _order(self, epoch: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + 1)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    def _fill_batches(self, order: list[int]) -> list[list[int]]:
        size = self.batch_size
        if self.traits is None:
            return [order[start : start + size] for start in range(0, len(order), size)]
        has, avoids = self.traits
        fresh, waiting = deque(order), deque[int]()
        batches: list[list[int]] = []
        while fresh or waiting:
            batch: list[int] = []
            present: set[int] = set()
            avoided: set[int] = set()
            postponed: list[int] = []
            for source in (waiting, fresh):
                for _ in range(min(len(source), 4 * size)):
                    if len(batch) == size:
                        break
                    example = source.popleft()
                    # an empty batch takes any example, so the loop ends
                    if avoided.isdisjoint(has[example]) and present.isdisjoint(avoids[example]):
                        batch.append(example)
                        present.update(has[example])
                        avoided.update(avoids[example])
                    else:
                        postponed.append(example)
            waiting.extend(postponed)
            batches.append(batch)
        return batches
