"""The engine's arguments, checked all at once, before anything heavy is loaded."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from llama_index_lora_embed import adapter, models
from llama_index_lora_embed.config import MiningSettings, ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset, LabelledPairs
from llama_index_lora_embed.data.holding_out import Trainable
from llama_index_lora_embed.errors import ConfigError, DatasetError, LoraEmbedError
from llama_index_lora_embed.presets import POOLING_MODES

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
    objective: Any,
    continuing: dict[str, Any],
    mining: Any,
    on_overlap: Any,
    allow_changes: Any,
    flags: dict[str, Any],
) -> tuple[Trainable, Trainable | None]:
    """The training and validation set, if they and everything else can be used.

    Args:
        settings: Whose problems are listed too.
        dataset: LabelledPairs, or anything that `EmbeddingQAFinetuneDataset.coerce` takes.
        val_dataset: The same, or None.
        model_id: Base model.
        model_output_path: Adapter directory.
        loss: None, a loss, or a callable.
        lora_config: None or a peft.LoraConfig.
        objective: None or ObjectiveSettings, whose problems are listed too.
        continuing: continue_from (None, or an adapter directory other than model_output_path), and what goes with
            None only: pooling, quantized.
        mining: None or MiningSettings, whose problems are listed too.
        on_overlap: "error", "drop" or "allow".
        allow_changes: A collection of names.
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
    problems += _problems_of_lora(lora_config)
    for name, value, kind in (("mining", mining, MiningSettings), ("objective", objective, ObjectiveSettings)):
        if isinstance(value, kind):
            problems += value.problems()
        elif value is not None:
            problems.append(f"{name} of type {type(value).__name__}: expected {kind.__name__}")
    if not isinstance(allow_changes, (list, tuple, set, frozenset)) or not all(
        isinstance(name, str) for name in allow_changes
    ):
        problems.append(f"allow_changes={allow_changes!r}: expected names in a list or tuple")
    problems += _problems_of_continuing(**continuing, lora_config=lora_config, output_path=model_output_path)
    if isinstance(place := continuing["continue_from"], (str, os.PathLike)):
        attempt(lambda: models.check_local(os.fspath(place)))
    if isinstance(dataset, LabelledPairs):
        if mining is not None:
            problems.append("mining with labelled pairs: expected None, because pairs bring their own negatives")
        if flags.get("use_all_docs"):
            problems.append("use_all_docs=True with labelled pairs: expected False, because they have no documents")
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
    train = attempt(lambda: _coerce(dataset, "dataset"))
    val = None if val_dataset is None else attempt(lambda: _coerce(val_dataset, "val_dataset"))
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


def _coerce(value: Any, name: str) -> Trainable:
    if isinstance(value, LabelledPairs):
        return value.check(name)
    return EmbeddingQAFinetuneDataset.coerce(value, name).check(name)


def _problems_of_continuing(
    continue_from: Any, pooling: Any, quantized: Any, lora_config: Any, output_path: Any
) -> list[str]:
    """What speaks against training an adapter further."""
    problems = []
    if pooling is not None and pooling not in POOLING_MODES:
        problems.append(f"pooling={pooling!r}: expected None or one of {', '.join(POOLING_MODES)}")
    if continue_from is None:
        return problems
    if not isinstance(continue_from, (str, os.PathLike)) or not str(continue_from):
        return [*problems, f"continue_from={continue_from!r}: expected the path or Hub id of an adapter"]
    path = os.path.abspath(os.path.expanduser(output_path)) if isinstance(output_path, (str, os.PathLike)) else None
    if absolute(continue_from) == path:
        problems.append(
            f"continue_from={str(continue_from)!r}, the same as model_output_path: expected a new directory"
        )
    owned = {"lora_config": lora_config, "pooling": pooling, "quantized": quantized or None}
    return problems + [
        f"{name} with continue_from: expected none, because the adapter was made with its own"
        for name, value in owned.items()
        if value is not None
    ]


def absolute(path: str | os.PathLike[str]) -> str:
    """A folder's absolute path, so that a changed working directory changes nothing; a Hub id as it is."""
    text = os.path.expanduser(os.fspath(path))
    return os.path.abspath(text) if os.path.exists(text) else text


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


def _problems_of_lora(value: Any) -> list[str]:
    """Without importing peft, unless a LoraConfig is there: who holds one has imported it."""
    if value is None:
        return []
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(value, peft.LoraConfig):
        return [f"lora_config of type {type(value).__name__}: expected peft.LoraConfig"]
    from llama_index_lora_embed.training.lora import lora_problems

    return lora_problems(value)
