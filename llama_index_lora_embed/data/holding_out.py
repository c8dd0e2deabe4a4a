"""What an adapter is judged by: held out where the user gave nothing, and not trained on where they did."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.data.split import split_by_source
from llama_index_lora_embed.errors import DatasetError, SplitError, warn_user

logger = logging.getLogger(__name__)

Trainable = EmbeddingQAFinetuneDataset | LabelledPairs
"""What an adapter can be trained on, and judged by."""


def hold_out(
    dataset: Trainable, fraction: float, seed: int, max_passages: int, in_vain: Sequence[str] = ()
) -> tuple[Trainable, Trainable | None, str]:
    """Split a training set into training and validation; warns where it cannot be split.

    Args:
        dataset: Checked.
        fraction: Share of the questions or pairs to hold out.
        seed: Of the draw.
        max_passages: Passages searched in the validation set.
        in_vain: Settings of the user's that have no effect where nothing is held out; the warning names them.

    Returns:
        Training set, validation set (None where it cannot be split), and how it was split, in words.
    """
    try:
        if isinstance(dataset, LabelledPairs):
            note = "The pairs were held out of the training set; no text of theirs was trained on."
            return *dataset.split(fraction, seed), note
        train, val = split_by_source(dataset, fraction, seed=seed, max_passages=max_passages)
    except SplitError as error:
        idle = f" Without effect: {', '.join(in_vain)}." if in_vain else ""
        warn_user(f"Nothing is held out to judge by: {error}{idle}")
        return dataset, None, ""
    if train.source_documents:
        return train, val, "The questions were held out of the training set by source document."
    note = (
        "The questions were held out of the training set by passage, because it does not record source documents: "
        "neighbouring passages may have been trained on."
    )
    return train, val, note


def without_overlap(train: Trainable, val: Trainable, *, drop: bool) -> Trainable:
    """The training set, if it trains on nothing that `val` asks for; datasets of two kinds are not compared.

    Raises:
        DatasetError: It does, and `drop` is off or would leave nothing.
    """
    if isinstance(train, LabelledPairs):
        return _pairs_without_overlap(train, val, drop) if isinstance(val, LabelledPairs) else train
    if isinstance(val, LabelledPairs):
        return train
    shared = train.overlap(val)
    if not shared:
        return train
    if not drop or len(shared) == len(train.queries):
        raise DatasetError(
            f"{len(shared)} of {len(train.queries)} training questions about passages that val_dataset asks for",
            "a val_dataset about documents that are not trained on: a score on known answers says nothing",
            "Split by document with split_by_source(dataset), drop them from training with on_overlap='drop', or "
            "accept it with on_overlap='allow'. The questions:",
            [f"query {query_id!r}: {train.queries[query_id]!r:.80}" for query_id in shared],
        )
    logger.warning("%d training questions about passages of val_dataset were dropped", len(shared))
    left = set(shared)
    return train.subset((i for i in train.queries if i not in left), train.corpus)


def _pairs_without_overlap(train: LabelledPairs, val: LabelledPairs, drop: bool) -> LabelledPairs:
    shared = train.overlap(val)
    if not shared:
        return train
    if not drop or len(shared) == len(train):
        raise DatasetError(
            f"{len(shared)} of {len(train)} training pairs that are in val_dataset too",
            "a val_dataset of other pairs: a score on known pairs says nothing",
            "Split with dataset.split(), drop them from training with on_overlap='drop', or accept it with "
            "on_overlap='allow'. The pairs:",
            [f"pair {i}: {train.texts1[i]!r:.60} and {train.texts2[i]!r:.60}" for i in shared],
        )
    logger.warning("%d training pairs of val_dataset were dropped", len(shared))
    left = set(shared)
    return train.subset(i for i in range(len(train)) if i not in left).check("dataset")
