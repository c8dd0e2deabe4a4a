"""Training batches of groups: each passage once, with all its queries and no false negatives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.models.windows import COUNTS, windows_in
from llama_index_lora_embed.training.efficiency.frozen_layers import TEXT_IDS, text_id
from llama_index_lora_embed.training.examples import TrainingGroup
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_CHUNK_SIZE = 8  # passages encoded at once, at most
_CHUNK_SIZE_ON_ACCELERATORS = 64  # because there each pass waits for the launch of its kernels
CHUNK_TOKENS = 1280  # and tokens of them: what a pass works with is as large as half a model
_CHARACTERS = 4.5  # of a token, in English
# labels that are no relevance; a guide may turn NEGATIVE into IGNORED, but not CURATED
NEGATIVE, IGNORED, CURATED = 0.0, -1.0, -2.0


class GroupCollator:
    """Makes one batch of token tensors from groups.

    It gets features of the form {"group": index}. The batch holds `q0_*`, `q1_*`, ... (queries) and `p0_*`, `p1_*`,
    ... (passages), which are chunks with their own padding, and `label`, a float32 tensor [queries, passages]: the
    relevance (above 0, at most 1) of a query's passage, NEGATIVE, IGNORED, or CURATED for the query's own hard
    negatives. Hard negatives join the batch once, however many queries share them. A passage is ignored for a query
    where `FalseNegatives` says so, unless it is among the query's own hard negatives.

    The label has a row for each query and passage that it is trained against. With `soft`, it has one row for each
    query, and all of its passages in the batch are its targets, each with its relevance.

    With `teacher_scores`, the label is [2, queries, passages]: the above, and the teacher's score of the query and the
    passage, NaN where there is none.

    Each of several processes gets the same groups, makes the label of all of them, and tokenizes its own share: of n
    queries in the label's order those at `rank`, `rank + world`, ..., and of the passages likewise. Both are sorted
    by length, so that the shares cost the same.

    Args:
        model: Tokenizes, with its query and document prompts.
        groups: The groups that indices refer to.
        false_negatives: What is ignored; None uses the defaults of `ObjectiveSettings` without near-duplicates.
        soft: Whether all of a query's passages in the batch are its targets.
        teacher_scores: Query id to text of a passage to its score.
        mini_batch_size: Texts in a chunk (windows, where long texts have several); None for 8 passages or 32 queries
            of about `chunk_tokens` tokens together, on accelerators for 64 or 256 of any length.

    Attributes:
        chunk_tokens: Less than the default for little memory.

    Raises:
        ConfigError: A batch has fewer groups than there are processes.
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
        teacher_scores: Mapping[str, Mapping[str, float]] | None = None,
        mini_batch_size: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.groups = groups
        self.false_negatives = false_negatives or FalseNegatives(dataset, ObjectiveSettings().sibling_window)
        self.soft = soft
        self.teacher_scores = teacher_scores
        self.mini_batch_size = mini_batch_size
        self.chunk_tokens = CHUNK_TOKENS
        self.rank = rank
        self.world = world

    def __call__(self, features: list[dict[str, int]]) -> dict[str, Any]:
        """Make a batch."""
        if len(features) < self.world:
            raise ConfigError(
                f"a batch of {len(features)} passage(s) for {self.world} processes",
                "at least one for each process",
                "Start fewer processes, or add training data.",
            )
        groups = [self.groups[feature["group"]] for feature in features]
        passages = self._passages(groups)
        order = sorted(range(len(passages)), key=lambda i: -len(passages[i][1]))
        column = {old: new for new, old in enumerate(order)}
        passages = [passages[i] for i in order]
        rows = [(query_id, [column[at]]) for at, group in enumerate(groups) for query_id in group.query_ids]
        if self.soft:
            joined: dict[str, list[int]] = {}
            for query_id, columns in rows:
                joined.setdefault(query_id, []).extend(columns)
            rows = list(joined.items())
        rows.sort(key=lambda row: -len(self.dataset.queries[row[0]]))
        label = self._label(rows, [passage_id for passage_id, _ in passages])
        if self.teacher_scores is not None:
            texts = [text for _, text in passages]
            scores = [[self.teacher_scores[query_id].get(text, math.nan) for text in texts] for query_id, _ in rows]
            label = torch.stack([label, torch.tensor(scores)])
        batch: dict[str, Any] = {"label": label}
        size = _CHUNK_SIZE if self.model.device.type == "cpu" else _CHUNK_SIZE_ON_ACCELERATORS
        self._add(batch, "q", [self.dataset.queries[query_id] for query_id, _ in rows], "query", 4 * size)
        self._add(batch, "p", [text for _, text in passages], "document", size)
        return batch

    def _passages(self, groups: list[TrainingGroup]) -> list[tuple[str, str]]:
        """(id, text) of each group's passage, then of the hard negatives that are not among them."""
        curated = self.dataset.hard_negatives or {}
        passages = [(group.passage_id, group.passage) for group in groups]
        present = set(passages)
        query_ids = dict.fromkeys(q for group in groups for q in group.query_ids)
        for passage_id in dict.fromkeys(i for q in query_ids for i in curated.get(q, ())):
            if (passage := (passage_id, self.dataset.corpus[passage_id])) not in present:
                passages.append(passage)
        return passages

    def _label(self, rows: list[tuple[str, list[int]]], passage_ids: list[str]) -> torch.Tensor:
        """The label, float32 [queries, passages], of (query id, columns of its passages)."""
        curated = self.dataset.hard_negatives or {}
        positions = self.false_negatives.index(passage_ids)
        columns: dict[str, list[int]] = {}
        for at, passage_id in enumerate(passage_ids):
            columns.setdefault(passage_id, []).append(at)
        label = torch.full((len(rows), len(passage_ids)), NEGATIVE)
        for row, (query_id, targets) in enumerate(rows):
            label[row, list(self.false_negatives.among(query_id, positions))] = IGNORED
            for passage_id in curated.get(query_id, ()):
                label[row, columns[passage_id]] = CURATED
            if self.soft:
                # but no other cut of the same node: with inverse cloze, that one still contains the query itself
                nodes = {passage_ids[at] for at in targets}
                others = [i for i in self.dataset.relevant_docs[query_id] if i not in nodes]
                targets = [*targets, *(columns[i][0] for i in dict.fromkeys(others) if i in columns)]
            for at in targets:
                label[row, at] = self.dataset.score(query_id, passage_ids[at])
        return label

    def _add(self, batch: dict[str, Any], letter: str, texts: list[str], task: str, size: int) -> None:
        texts = texts[self.rank :: self.world]
        prompt = self.model.prompts.get(task) or None
        for number, chunk in enumerate(self._chunks(texts, prompt or "", self.mini_batch_size or size)):
            features = self.model.preprocess(chunk, prompt=prompt, task=task)
            for key, value in features.items():
                batch[f"{letter}{number}_{key}"] = value
            counts = features[COUNTS].tolist() if COUNTS in features else [1] * len(chunk)
            ids = [text_id(task, text, i) for text, count in zip(chunk, counts, strict=True) for i in range(count)]
            batch[f"{letter}{number}_{TEXT_IDS}"] = torch.tensor(ids)

    def _chunks(self, texts: list[str], prompt: str, size: int) -> Iterator[list[str]]:
        """Neighboring texts of at most `size` windows together; a text without windows counts as one."""
        chunk: list[str] = []
        longest = self.model.max_seq_length or self.chunk_tokens
        limited = self.mini_batch_size is None and self.model.device.type == "cpu"
        left, tokens = size, 0.0
        for text, needed in zip(texts, windows_in(self.model, texts, prompt), strict=True):
            own = min(longest, (len(prompt) + len(text)) / _CHARACTERS)
            full = limited and tokens + own > self.chunk_tokens
            if chunk and (needed > left or full):
                yield chunk
                chunk, left, tokens = [], size, 0.0
            chunk.append(text)
            left, tokens = left - needed, tokens + own
        if chunk:
            yield chunk
