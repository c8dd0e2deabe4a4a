"""The seam between the two kinds of data that an adapter is trained and evaluated on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from llama_index_lora_embed.core.errors import ConfigError, DatasetError, warn_user
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.data.questions.query_log import dataset_from_pairs
from llama_index_lora_embed.data.readers.labelled import choose_columns
from llama_index_lora_embed.data.split import folds_by_source, split_by_source

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


def from_huggingface(value: Any, name: str) -> Any:
    """A Hugging Face dataset, read as training data; any other value as it is.

    Two columns of the same kind with a label (sentence1, sentence2, score) are labelled pairs. Others are read by
    `dataset_from_pairs`: anchor, positive and negatives, or query, passage and label. What is read is in memory;
    `dataset_from_pairs(value, max_queries=...)` takes a sample.

    Raises:
        ConfigError: The columns are not recognised.
        DatasetError: It is a dict of splits, or has rows that cannot be used.
    """
    if not type(value).__module__.startswith("datasets."):
        return value
    if isinstance(value, Mapping):
        shown = ", ".join(map(repr, value))
        hint = f"Pass one of them, such as dataset[{next(iter(value), None)!r}]."
        raise DatasetError(f"{name} of the splits {shown}", "one split", hint)
    try:
        roles = choose_columns(value.column_names or list(next(iter(value), {})), None)[3]
    except ConfigError:
        roles = True
    if not roles:
        return LabelledPairs.from_rows(value, source=name)
    dataset, report = dataset_from_pairs(value)
    if report.skipped:
        warn_user(f"{report.skipped.total()} rows or texts of {name} are not used ({report.counts}).")
    return dataset


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
        train, val = data.split(fraction, seed)
        clean = "" if val.shared_texts(train) else "; none of their texts was trained on"
        return train, val, f"The pairs were held out of the training set{clean}."
    note = "The queries were held out of the training set by source document."
    if not data.source_documents:
        note = (
            "The queries were held out of the training set by passage, because it does not record source "
            "documents: neighbouring passages may have been trained on."
        )
    return *split_by_source(data, fraction, seed=seed, max_passages=max_passages), note


def folds_of(
    data: TrainingData, count: int, *, seed: int, max_passages: int
) -> Sequence[tuple[TrainingData, TrainingData]]:
    """(training, validation) of each fold: by `folds_by_source`, or as many splits of labelled pairs with other seeds.

    Raises:
        ConfigError: `count` is below 2.
        SplitError: Too much is tied together.
    """
    if isinstance(data, LabelledPairs):
        return [data.split(1 / count, seed + number) for number in range(count)]
    return folds_by_source(data, count, seed=seed, max_passages=max_passages)


def without_trained(train: TrainingData, val: TrainingData) -> tuple[TrainingData | None, str]:
    """The validation set without the queries or pairs that the training set holds, and a sentence that counts them.

    Passages with other queries stay, as do texts in other pairs (`trained_note`): users ask new questions about the
    passages that were trained on.

    Args:
        train: Training set.
        val: Validation set; queries and pairs share nothing.

    Returns:
        None instead of the validation set if nothing is left that a model can be evaluated on (no query; pairs of one
        label); an empty sentence if nothing is shared.
    """
    rest: TrainingData
    if isinstance(train, LabelledPairs) and isinstance(val, LabelledPairs):
        pairs = set(val.overlap(train))
        rest = val.subset(i for i in range(len(val)) if i not in pairs)
        usable, shared, all_of_them, what = len(set(rest.scores)) > 1, len(pairs), len(val), "pairs"
    elif isinstance(train, EmbeddingQAFinetuneDataset) and isinstance(val, EmbeddingQAFinetuneDataset):
        queries = set(val.shared_queries(train))
        rest = val.subset((i for i in val.queries if i not in queries), val.corpus)
        usable, shared, all_of_them, what = bool(rest.queries), len(queries), len(val.queries), "queries"
    else:
        return val, ""
    if not shared:
        return val, ""
    note = f"{shared} of {all_of_them} validation {what} are training {what}, too, and"
    if usable:
        return rest, f"{note} were dropped."
    return None, f"{note} {'were not' if shared == all_of_them else 'the others have one label: none was'} used."


def refuse_overlap(train: TrainingData, val: TrainingData) -> None:
    """Check that validation shares neither queries nor passages nor source documents with training, nor texts of pairs.

    Raises:
        DatasetError: It does; `.problems` names the queries or pairs.
    """
    if isinstance(train, LabelledPairs) and isinstance(val, LabelledPairs):
        what = f"of {len(val)} validation pairs with texts that are in training pairs, too"
        shared = [f"pair {i}: {val.texts1[i]!r:.60} and {val.texts2[i]!r:.60}" for i in val.shared_texts(train)]
    elif isinstance(train, EmbeddingQAFinetuneDataset) and isinstance(val, EmbeddingQAFinetuneDataset):
        what = f"of {len(val.queries)} validation queries that are in training, too, or whose passages or documents are"
        found = {*val.shared_queries(train), *val.overlap(train)}
        shared = [f"query {i!r}: {text!r:.80}" for i, text in val.queries.items() if i in found]
    else:
        return
    if shared:
        raise DatasetError(
            f"{len(shared)} {what}",
            "no overlap, because of on_overlap='raise'",
            "Split with split_by_source(dataset), or leave these out of one side; on_overlap='drop' only drops queries "
            "and pairs that are trained on, and names the share of passages that are. These overlap:",
            shared,
        )


def trained_note(train: TrainingData, val: TrainingData) -> str:
    """How many passages or texts of a validation set were trained on, in a sentence; "" for none."""
    if isinstance(train, LabelledPairs) and isinstance(val, LabelledPairs):
        count = len(val.shared_texts(train))
        note = f"{count} of {len(val)} validation pairs have a text that was trained on in another pair."
    elif isinstance(train, EmbeddingQAFinetuneDataset) and isinstance(val, EmbeddingQAFinetuneDataset):
        count, relevant = len(val.shared_passages(train)), len(val.answer_ids())
        share = f"{100 * count / relevant:.0f} % of the relevant validation passages ({count} of {relevant})"
        note = f"{share} were trained on, with other queries."
    else:
        return ""
    return note if count else ""
