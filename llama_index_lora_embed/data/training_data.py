"""The seam between the two kinds of data that an adapter is trained and evaluated on."""

from __future__ import annotations

import os
from typing import Any, Literal, TypeAlias

from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs

TrainingData: TypeAlias = EmbeddingQAFinetuneDataset | LabelledPairs
"""Queries with their passages, or labelled pairs. Both have

- `kind`, "queries" or "pairs", by which type checkers tell them apart as `isinstance` does;
- `check(name)`, `digest()`, `order_digest()`, `summary()` (for the manifest);
- `hold_out(fraction, seed=, max_passages=)` and `without_overlap(val, drop=)`.
"""


def coerce_training_data(value: Any, name: str) -> TrainingData:
    """Labelled pairs as they are, or what `EmbeddingQAFinetuneDataset.coerce` takes; checked.

    Args:
        value: The data.
        name: What error messages call it.

    Raises:
        DatasetError: It is of another type, empty, or has problems.
    """
    if isinstance(value, LabelledPairs):
        return value.check(name)
    return EmbeddingQAFinetuneDataset.coerce(value, name).check(name)


def read_training_data(path: str | os.PathLike[str], kind: Literal["queries", "pairs"]) -> TrainingData:
    """Training or validation data from a file.

    Args:
        path: JSON of an `EmbeddingQAFinetuneDataset`, or labelled pairs in any form that `LabelledPairs` reads.
        kind: Which of the two it is.

    Raises:
        DatasetError: It cannot be read, or holds something else.
    """
    if kind == "queries":
        return EmbeddingQAFinetuneDataset.from_json(str(path))
    return LabelledPairs.coerce(path)
