"""The seam between the two kinds of data that an adapter is trained and evaluated on."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal, TypeAlias

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.data.split import split_by_source

logger = logging.getLogger(__name__)

TrainingData: TypeAlias = EmbeddingQAFinetuneDataset | LabelledPairs
"""Queries with their passages, or labelled pairs; both have `kind`, `check(name)`, `digest()`, `order_digest()` and
`summary()`.
"""


def coerce_training_data(value: Any, name: str) -> TrainingData:
    """Labelled pairs as they are, or what `EmbeddingQAFinetuneDataset.coerce` takes; checked.

    Raises:
        DatasetError: It is of another type, empty, or has problems.
    """
    if isinstance(value, LabelledPairs):
        return value.check(name)
    return EmbeddingQAFinetuneDataset.coerce(value, name).check(name)


def read_training_data(path: str | os.PathLike[str], kind: Literal["queries", "pairs"]) -> TrainingData:
    """Training or validation data from a file that `EmbeddingQAFinetuneDataset` or `LabelledPairs` reads.

    Raises:
        DatasetError: It cannot be read, or holds something else.
    """
    return LabelledPairs.coerce(path) if kind == "pairs" else EmbeddingQAFinetuneDataset.from_json(path)


def hold_out(
    data: TrainingData, fraction: float, *, seed: int, max_passages: int
) -> tuple[TrainingData, TrainingData, str]:
    """(training set, validation set, how they were split in a sentence), by `split_by_source` or `LabelledPairs.split`.

    Raises:
        SplitError: Everything is tied together, or a side would have one label only.
    """
    if isinstance(data, LabelledPairs):
        note = "The pairs were held out of the training set; none of their texts was trained on."
        return *data.split(fraction, seed), note
    note = "The queries were held out of the training set by source document."
    if not data.source_documents:
        note = (
            "The queries were held out of the training set by passage, because it does not record source "
            "documents: neighbouring passages may have been trained on."
        )
    return *split_by_source(data, fraction, seed=seed, max_passages=max_passages), note


def without_overlap(train: TrainingData, val: TrainingData, *, drop: bool) -> TrainingData:
    """The training set without its queries or pairs that are in `train.overlap(val)`; queries and pairs share nothing.

    Raises:
        DatasetError: They overlap, and `drop` is off or would leave nothing.
    """
    rest: TrainingData
    if isinstance(train, LabelledPairs) and isinstance(val, LabelledPairs):
        pairs = set(train.overlap(val))
        what = f"{len(pairs)} of {len(train)} training pairs that are in val_dataset too"
        shared = [f"pair {i}: {train.texts1[i]!r:.60} and {train.texts2[i]!r:.60}" for i in sorted(pairs)]
        rest = train.subset(i for i in range(len(train)) if i not in pairs)
    elif isinstance(train, EmbeddingQAFinetuneDataset) and isinstance(val, EmbeddingQAFinetuneDataset):
        queries = dict.fromkeys(train.overlap(val))
        what = f"{len(queries)} of {len(train.queries)} training queries whose answers are answers in val_dataset too"
        shared = [f"query {i!r}: {train.queries[i]!r:.80}" for i in queries]
        rest = train.subset((i for i in train.queries if i not in queries), train.corpus)
    else:
        return train
    if not shared:
        return train
    if not drop or not (rest.scores if isinstance(rest, LabelledPairs) else rest.queries):
        raise DatasetError(
            what,
            "validation data that is not trained on: scores on known answers and pairs mean nothing",
            "Split with split_by_source(dataset) or pairs.split(), drop them from training with on_overlap='drop', or "
            "accept it with on_overlap='allow'. These overlap:",
            shared,
        )
    logger.warning("%s were dropped", what)
    return rest.check("dataset")
