"""The engine's arguments, checked all at once, before anything heavy is loaded."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from llama_index_lora_embed import adapter, models
from llama_index_lora_embed.config import MiningSettings, TrainingSettings
from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.errors import ConfigError, DatasetError, LoraEmbedError

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def check_arguments(
    settings: TrainingSettings,
    dataset: Any,
    val_dataset: Any,
    *,
    model_id: Any,
    model_output_path: Any,
    loss: Any,
    lora_config: Any,
    mining: Any,
    on_overlap: Any,
    flags: dict[str, Any],
) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset | None]:
    """The training and validation set, if they and everything else can be used.

    Args:
        settings: Whose problems are listed too.
        dataset: Anything that `EmbeddingQAFinetuneDataset.coerce` takes.
        val_dataset: The same, or None.
        model_id: Base model.
        model_output_path: Adapter directory.
        loss: None, a loss, or a callable.
        lora_config: None or a peft.LoraConfig.
        mining: None or MiningSettings, whose problems are listed too.
        on_overlap: "error", "drop" or "allow".
        flags: Arguments that have to be True or False.

    Raises:
        LoraEmbedError: Of the one kind of problem there is; of several kinds, a ConfigError that lists them all.
    """
    errors: list[LoraEmbedError] = []

    def attempt(check: Callable[[], _T]) -> _T | None:
        try:
            return check()
        except LoraEmbedError as error:
            errors.append(error)
            return None

    problems = settings.problems()
    problems += [
        f"{name}={value!r}: expected True or False" for name, value in flags.items() if not isinstance(value, bool)
    ]
    if settings.batch_size == 1 and loss is None:
        problems.append("batch_size=1: expected at least 2, because a passage's negatives are the others of its batch")
    if on_overlap not in ("error", "drop", "allow"):
        problems.append(f"on_overlap={on_overlap!r}: expected 'error', 'drop' or 'allow'")
    if lora_config is not None and not _is_lora_config(lora_config):
        problems.append(f"lora_config of type {type(lora_config).__name__}: expected peft.LoraConfig")
    if isinstance(mining, MiningSettings):
        problems += mining.problems()
    elif mining is not None:
        problems.append(f"mining of type {type(mining).__name__}: expected MiningSettings")
    if loss is not None and not callable(loss):
        problems.append(f"loss of type {type(loss).__name__}: expected a sentence-transformers loss")
    for name, value, check in (
        ("model_id", model_id, models.check_local),
        ("model_output_path", model_output_path, adapter.check_output),
    ):
        if isinstance(value, (str, os.PathLike)) and str(value):
            attempt(lambda check=check, value=value: check(str(value)))  # type: ignore[misc]
        else:
            problems.append(f"{name}={value!r}: expected text")
    if problems:
        errors.append(ConfigError(f"{len(problems)} wrong argument(s)", "those named", "Correct them:", problems))
    train = attempt(lambda: EmbeddingQAFinetuneDataset.coerce(dataset, "dataset").check("dataset"))
    val = None
    if val_dataset is not None:
        val = attempt(lambda: EmbeddingQAFinetuneDataset.coerce(val_dataset, "val_dataset").check("val_dataset"))
    if train is not None and val is not None and on_overlap != "allow":
        both = (train, val)
        train = attempt(lambda: without_overlap(*both, drop=on_overlap == "drop"))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        listed = [line for error in errors for line in (getattr(error, "problems", None) or [str(error)])]
        raise ConfigError(f"{len(listed)} problem(s)", "arguments without any", "Mend them all:", listed)
    assert train is not None
    return train, val


def without_overlap(
    train: EmbeddingQAFinetuneDataset, val: EmbeddingQAFinetuneDataset, *, drop: bool
) -> EmbeddingQAFinetuneDataset:
    """The training set, if it trains on nothing that `val` asks for.

    Raises:
        DatasetError: It does, and `drop` is off or would leave nothing.
    """
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


def _is_lora_config(value: Any) -> bool:
    """Without importing peft: who holds a LoraConfig has imported it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(value, peft.LoraConfig)
