"""Training batches: each passage once, with all its questions, and no false negatives among them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset, normalise
from llama_index_lora_embed.errors import DatasetError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Passages encoded in one go. Sorted by length, short ones are not padded to the longest of the batch.
_CHUNK = 8
NEGATIVE, IGNORED = 0.0, -1.0


@dataclass
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
    if len({normalise(dataset.corpus[group.passage_id]) for group in groups.values()}) < 2:
        raise DatasetError(
            "a training set with questions about one passage only",
            "at least two different passages: each is told from the others of its batch",
            "Add questions about other passages.",
        )
    return list(groups.values())


class GroupCollator:
    """Groups in, one batch of token tensors out.

    The batch holds `q0_*`, `q1_*`, ... (questions) and `p0_*`, `p1_*`, ... (passages), chunks that are padded
    by themselves, and `label`, a float32 tensor [questions, passages]: how relevant the question's passage is, above 0
    and at most 1, NEGATIVE and IGNORED. A
    passage is ignored for a question, not negative, if it is the same node or text as a passage that answers the
    question or another of the same wording, or if it comes from the same document and holds the question word
    for word (overlapping chunks); unless it is among the question's own curated hard negatives.

    Args:
        model: Tokenises, with its query and document prompts.
        dataset: Texts and judgments.
        groups: What the indices in the rows mean.
    """

    valid_label_columns = ("label",)

    def __init__(
        self, model: SentenceTransformer, dataset: EmbeddingQAFinetuneDataset, groups: list[TrainingGroup]
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.groups = groups
        self.relevant: dict[str, set[str]] = {}  # by wording, because one title can be several nodes'
        for query_id, text in dataset.queries.items():
            self.relevant.setdefault(normalise(text), set()).update(dataset.relevant_docs[query_id])

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        """Collate rows of {"group": index}."""
        groups = [self.groups[row["group"]] for row in rows]
        passages = [(group.passage_id, group.passage) for group in groups]
        positives = {(query_id, column) for column, group in enumerate(groups) for query_id in group.query_ids}
        curated = self.dataset.hard_negatives or {}
        query_ids = list(dict.fromkeys(q for group in groups for q in group.query_ids))
        passages += [
            (i, self.dataset.corpus[i])
            for i in dict.fromkeys(i for q in query_ids for i in curated.get(q, []))
            if (i, self.dataset.corpus[i]) not in passages
        ]
        queries = [(q, column) for q, column in sorted(positives, key=lambda pair: pair[1])]
        queries.sort(key=lambda pair: -len(self.dataset.queries[pair[0]]))
        order = sorted(range(len(passages)), key=lambda i: -len(passages[i][1]))
        place = {old: new for new, old in enumerate(order)}
        passages = [passages[i] for i in order]
        label = torch.full((len(queries), len(passages)), NEGATIVE)
        texts = [normalise(text) for _, text in passages]
        for row, (query_id, column) in enumerate(queries):
            question = normalise(self.dataset.queries[query_id])
            relevant = self.relevant[question]
            documents = {self.dataset.source_of(i) for i in relevant}
            relevant_texts = {normalise(self.dataset.corpus[i]) for i in relevant}
            negatives = set(curated.get(query_id, ()))
            for index, (passage_id, _) in enumerate(passages):
                answers = passage_id in relevant or texts[index] in relevant_texts
                overlaps = self.dataset.source_of(passage_id) in documents and question in texts[index]
                if passage_id not in negatives and (answers or overlaps):
                    label[row, index] = IGNORED
            label[row, place[column]] = self.dataset.score(query_id, groups[column].passage_id)
        batch: dict[str, Any] = {"label": label}
        self._add(batch, "q", [self.dataset.queries[q] for q, _ in queries], "query", 4 * _CHUNK)
        self._add(batch, "p", [text for _, text in passages], "document", _CHUNK)
        return batch

    def _add(self, batch: dict[str, Any], letter: str, texts: list[str], task: str, size: int) -> None:
        prompt = self.model.prompts.get(task) or None
        for number, start in enumerate(range(0, len(texts), size)):
            features = self.model.preprocess(texts[start : start + size], prompt=prompt, task=task)
            for key, value in features.items():
                batch[f"{letter}{number}_{key}"] = value


class GroupBatchSampler(DefaultBatchSampler):
    """Shuffles the groups and deals them into batches of nearly one size.

    The order depends on seed and epoch alone, so that a resumed run sees what an uninterrupted one would. No
    batch has one passage only, which would have no negatives; for that, batches of 2 can become 3.
    """

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
        return max(1, min(math.ceil(count / self.batch_size), count // 2))
