"""Training batches: each passage once, with all its questions, and no false negatives among them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset, normalise
from llama_index_lora_embed.models.windows import COUNTS, windows_in
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.efficiency.frozen_layers import TEXT_IDS, text_id
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Passages encoded in one go. Sorted by length, short ones are not padded to the longest of the batch.
_CHUNK = 8
# What a label above 0 is not. A guide may take a NEGATIVE for a false one, a CURATED one never.
NEGATIVE, IGNORED, CURATED = 0.0, -1.0, -2.0


@dataclass(slots=True)
class TrainingGroup:
    """One passage and the questions that it answers.

    Attributes:
        passage: Text to encode.
        passage_id: Its node; several groups can share it (inverse cloze cuts a node in several ways).
        query_ids: Its questions.
    """

    passage: str
    passage_id: str
    query_ids: list[str] = field(default_factory=list)


def make_groups(dataset: EmbeddingQAFinetuneDataset, use_all_docs: bool) -> list[TrainingGroup]:
    """Group the questions by the passage that they are trained against.

    Args:
        dataset: Checked dataset.
        use_all_docs: Train a question with all its relevant passages instead of the first one only.

    Raises:
        DatasetError: Fewer than two passages, so that there is nothing to tell a passage from.
    """
    groups: dict[tuple[str, str], TrainingGroup] = {}
    for query_id in dataset.queries:
        relevant = dataset.relevant_docs[query_id]
        for passage_id in dict.fromkeys(relevant if use_all_docs else relevant[:1]):
            cut = (dataset.training_passages or {}).get(query_id) if passage_id == relevant[0] else None
            text = cut or dataset.corpus[passage_id]
            group = groups.setdefault((passage_id, text), TrainingGroup(text, passage_id))
            group.query_ids.append(query_id)
    texts = (normalise(dataset.corpus[group.passage_id]) for group in groups.values())
    first = next(texts, None)
    if all(text == first for text in texts):
        raise DatasetError(
            "a training set with questions about one passage only",
            "at least two different passages: each is told from the others of its batch",
            "Add questions about other passages.",
        )
    return list(groups.values())


class GroupCollator:
    """Groups in, one batch of token tensors out.

    The batch holds `q0_*`, `q1_*`, ... (questions) and `p0_*`, `p1_*`, ... (passages), chunks that are padded
    by themselves, and `label`, a float32 tensor [questions, passages]: how relevant the question's passage is (above 0
    and at most 1), NEGATIVE, IGNORED, or CURATED for the question's own hard negatives. Hard negatives join the batch
    once, whoever shares them. A passage is ignored for a question, not negative, where `FalseNegatives` says so,
    unless it is among the question's own hard negatives.

    There is a row for each question and passage that it is trained against. With `soft`, there is one row for each
    question, and all of its passages that are in the batch are its targets, each with its relevance.

    Of several processes each gets the same groups, makes the label of them all, and tokenises its own share: of n
    questions in the label's order, those at `rank`, `rank + world`, ...; of the passages likewise. Both are sorted by
    length, so that the shares cost the same.

    Args:
        model: Tokenises, with its query and document prompts.
        dataset: Texts and judgments.
        groups: What the indices in the rows mean.
        false_negatives: What is ignored; None takes the defaults of `ObjectiveSettings` without near-duplicates.
        soft: See above.
        mini_batch_size: Texts in a chunk, or windows of long ones, so many that are encoded in one go; None for 8
            passages or 32 questions.
        rank: Number of this process, from 0.
        world: How many processes there are.
    """

    valid_label_columns = ("label",)

    def __init__(
        self,
        model: SentenceTransformer,
        dataset: EmbeddingQAFinetuneDataset,
        groups: list[TrainingGroup],
        false_negatives: FalseNegatives | None = None,
        *,
        soft: bool = False,
        mini_batch_size: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.groups = groups
        self.false_negatives = false_negatives or FalseNegatives(dataset, ObjectiveSettings().sibling_window)
        self.soft = soft
        self.mini_batch_size = mini_batch_size
        self.rank = rank
        self.world = world

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        """Collate rows of {"group": index}.

        Raises:
            ConfigError: There are fewer groups than processes.
        """
        if len(rows) < self.world:
            raise ConfigError(
                f"a batch of {len(rows)} passage(s) for {self.world} processes",
                "at least one for each process",
                "Start fewer processes, or raise batch_size.",
            )
        groups = [self.groups[row["group"]] for row in rows]
        passages = self._passages(groups)
        order = sorted(range(len(passages)), key=lambda i: -len(passages[i][1]))
        place = {old: new for new, old in enumerate(order)}
        passages = [passages[i] for i in order]
        own = [(query_id, [place[at]]) for at, group in enumerate(groups) for query_id in group.query_ids]
        if self.soft:
            joined: dict[str, list[int]] = {}
            for query_id, columns in own:
                joined.setdefault(query_id, []).extend(columns)
            own = list(joined.items())
        own.sort(key=lambda pair: -len(self.dataset.queries[pair[0]]))
        batch: dict[str, Any] = {"label": self._label(own, [passage_id for passage_id, _ in passages])}
        self._add(batch, "q", [self.dataset.queries[q] for q, _ in own], "query", 4 * _CHUNK)
        self._add(batch, "p", [text for _, text in passages], "document", _CHUNK)
        return batch

    def _passages(self, groups: list[TrainingGroup]) -> list[tuple[str, str]]:
        """(node, text) of each group, then of the hard negatives that are not among them."""
        curated = self.dataset.hard_negatives or {}
        passages = [(group.passage_id, group.passage) for group in groups]
        there = set(passages)
        query_ids = dict.fromkeys(q for group in groups for q in group.query_ids)
        for passage_id in dict.fromkeys(i for q in query_ids for i in curated.get(q, ())):
            if (passage := (passage_id, self.dataset.corpus[passage_id])) not in there:
                passages.append(passage)
        return passages

    def _label(self, own: list[tuple[str, list[int]]], passage_ids: list[str]) -> torch.Tensor:
        """The label, float32 [questions, passages], of questions and the columns of their passages."""
        curated = self.dataset.hard_negatives or {}
        places = self.false_negatives.places(passage_ids)
        columns: dict[str, list[int]] = {}
        for at, passage_id in enumerate(passage_ids):
            columns.setdefault(passage_id, []).append(at)
        label = torch.full((len(own), len(passage_ids)), NEGATIVE)
        for row, (query_id, targets) in enumerate(own):
            ignored = self.false_negatives.among(query_id, places)
            label[row, list(ignored)] = IGNORED
            for passage_id in curated.get(query_id, ()):
                label[row, columns[passage_id]] = CURATED
            if self.soft:
                # not another cut of the same node: inverse cloze leaves the question itself in that one
                nodes = {passage_ids[at] for at in targets}
                others = [i for i in self.dataset.relevant_docs[query_id] if i not in nodes]
                targets = [*targets, *(columns[i][0] for i in dict.fromkeys(others) if i in columns)]
            for at in targets:
                label[row, at] = self.dataset.score(query_id, passage_ids[at])
        return label

    def _add(self, batch: dict[str, Any], letter: str, texts: list[str], task: str, size: int) -> None:
        texts = texts[self.rank :: self.world]
        size = self.mini_batch_size or size
        prompt = self.model.prompts.get(task) or None
        for number, chunk in enumerate(self._chunks(texts, prompt or "", size)):
            features = self.model.preprocess(chunk, prompt=prompt, task=task)
            for key, value in features.items():
                batch[f"{letter}{number}_{key}"] = value
            counts = features[COUNTS].tolist() if COUNTS in features else [1] * len(chunk)
            ids = [text_id(task, text, i) for text, count in zip(chunk, counts, strict=True) for i in range(count)]
            batch[f"{letter}{number}_{TEXT_IDS}"] = torch.tensor(ids)

    def _chunks(self, texts: list[str], prompt: str, size: int) -> Iterator[list[str]]:
        """Neighbours of no more than `size` rows for the model, which are texts, or the windows of long ones."""
        rows = windows_in(self.model, texts, prompt)
        chunk: list[str] = []
        left = size
        for text, needed in zip(texts, rows, strict=True):
            if chunk and needed > left:
                yield chunk
                chunk, left = [], size
            chunk.append(text)
            left -= needed
        if chunk:
            yield chunk


class GroupBatchSampler(DefaultBatchSampler):
    """Shuffles the groups and deals them into batches of nearly one size.

    The order depends on seed and epoch alone, so that a resumed run sees what an uninterrupted one would. No
    batch has one passage only, which would have no negatives, or fewer than there are processes; for that, batches of
    2 can become 3. Of several processes each deals the same batches, so that `batch_size` is that of all together.

    Raises:
        ConfigError: There are fewer groups than processes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.least = max(2, distributed.world_size())
        if len(self.sampler) < distributed.world_size():  # type: ignore[arg-type]  # see __iter__
            raise ConfigError(
                f"{len(self.sampler)} training passage(s) for {distributed.world_size()} processes",  # type: ignore[arg-type]
                "at least one for each process",
                "Start fewer processes.",
            )

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the index lists of one epoch."""
        count = len(self.sampler)  # type: ignore[arg-type]  # torch's BatchSampler keeps the dataset as .sampler
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator).tolist()
        batches = len(self)
        for number in range(batches):
            yield order[number * count // batches : (number + 1) * count // batches]

    def __len__(self) -> int:
        """Batches in an epoch."""
        count = len(self.sampler)  # type: ignore[arg-type]
        return max(1, min(math.ceil(count / self.batch_size), count // self.least))


class ExampleTraits(NamedTuple):
    """What decides whether two rows can share a batch, as numbers.

    Attributes:
        has: Of each row, what its passages are known by.
        avoids: Of each row, what no passage of another row may have, or it would be a false negative.
    """

    has: list[tuple[int, ...]]
    avoids: list[tuple[int, ...]]

    @classmethod
    def of(cls, rows: Sequence[tuple[str, Sequence[str]]], false_negatives: FalseNegatives) -> ExampleTraits:
        """Of rows, each a question's id and its passages' ids, the hard negatives included."""
        numbers: dict[tuple[str, str], int] = {}
        traits: dict[str, tuple[int, ...]] = {}
        has, avoids = [], []
        for query_id, passage_ids in rows:
            for passage_id in passage_ids:
                if passage_id not in traits:
                    keys = false_negatives.traits(passage_id)
                    traits[passage_id] = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
            has.append(tuple(number for i in passage_ids for number in traits[i]))
            avoids.append(tuple(numbers.setdefault(key, len(numbers)) for key in false_negatives.blocked(query_id)))
        return cls(has, avoids)


class ExampleBatchSampler(DefaultBatchSampler):
    """Shuffles rows into batches in which no row's passage is a false negative of another row's question.

    For losses that take the other rows of a batch for negatives. The order depends on seed and epoch alone, so that a
    resumed run sees what an uninterrupted one would. Each epoch holds every row, in as many batches as the others.
    Batches are full until those rows are left that do not go together; where many rows have one passage, that can be
    many small ones. Each batch looks at a few rows more than it holds, so that the time grows with the rows.

    Args:
        *args: As for `DefaultBatchSampler`; `drop_last` is ignored.
        traits: What cannot share a batch; None for losses to which the rows of a batch mean nothing.
        rank: Number of this process, from 0; it gets the batches `rank`, `rank + world`, ...
        world: How many processes there are. The first batches are repeated until all have as many.
        **kwargs: As for `DefaultBatchSampler`.
    """

    def __init__(
        self, *args: Any, traits: ExampleTraits | None = None, rank: int = 0, world: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.traits = traits
        self.rank = rank
        self.world = world
        self.rows = len(self.sampler)  # type: ignore[arg-type]  # torch's BatchSampler keeps the dataset as .sampler
        # epochs can differ in how many batches they need, but the schedule is made for one number
        self.spare = self._dealt(self._order(-1, self.rows))
        needed = len(self.spare)
        more = 0 if needed == math.ceil(self.rows / self.batch_size) else max(1, needed // 50)
        self.batches = min(self.rows, needed + more)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the index lists of one epoch."""
        batches = self._dealt(self._order(self.epoch, self.rows))
        if len(batches) > self.batches:
            batches = [self.spare[i] for i in self._order(self.epoch, len(self.spare))]
        while len(batches) < self.batches:
            longest = max(range(len(batches)), key=lambda i: len(batches[i]))
            half = len(batches[longest]) // 2
            batches[longest : longest + 1] = [batches[longest][:half], batches[longest][half:]]
        batches += batches[: -len(batches) % self.world]
        yield from batches[self.rank :: self.world]

    def __len__(self) -> int:
        """Batches in an epoch, for this process."""
        return math.ceil(self.batches / self.world)

    def _order(self, epoch: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + 1)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    def _dealt(self, order: list[int]) -> list[list[int]]:
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
                    row = source.popleft()
                    # an empty batch takes any row, so that this ends
                    if avoided.isdisjoint(has[row]) and present.isdisjoint(avoids[row]):
                        batch.append(row)
                        present.update(has[row])
                        avoided.update(avoids[row])
                    else:
                        postponed.append(row)
            waiting.extend(postponed)
            batches.append(batch)
        return batches
