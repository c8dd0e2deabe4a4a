"""Holding out what an adapter is judged by, where the user gave nothing."""

from __future__ import annotations

from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.data.split import split_by_source
from llama_index_lora_embed.errors import SplitError, warn_user

Trainable = EmbeddingQAFinetuneDataset | LabelledPairs
"""What an adapter can be trained on, and judged by."""


def hold_out(
    dataset: Trainable, fraction: float, seed: int, max_passages: int
) -> tuple[Trainable, Trainable | None, str]:
    """Split a training set into training and validation; warns where it cannot be split.

    Args:
        dataset: Checked.
        fraction: Share of the questions or pairs to hold out.
        seed: Of the draw.
        max_passages: Passages searched in the validation set.

    Returns:
        Training set, validation set (None where it cannot be split), and how it was split, in words.
    """
    try:
        if isinstance(dataset, LabelledPairs):
            note = "The pairs were held out of the training set; no text of theirs was trained on."
            return *dataset.split(fraction, seed), note
        train, val = split_by_source(dataset, fraction, seed=seed, max_passages=max_passages)
    except SplitError as error:
        warn_user(f"Nothing is held out to judge by: {error}")
        return dataset, None, ""
    if train.source_documents:
        return train, val, "The questions were held out of the training set by source document."
    note = (
        "The questions were held out of the training set by passage, because it does not record source documents: "
        "neighbouring passages may have been trained on."
    )
    return train, val, note
