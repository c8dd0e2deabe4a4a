"""The engine's arguments, checked all at once, before anything heavy is loaded."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llama_index_lora_embed.config import IN_BATCH, MiningSettings, ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.errors import ConfigError, LoraEmbedError, OutputDirectoryError
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset, LabelledPairs
from llama_index_lora_embed.data.split import Trainable, drop_overlap
from llama_index_lora_embed.evaluation import metrics
from llama_index_lora_embed.models import adapter_directory, base_model
from llama_index_lora_embed.models.prompts import POOLING_MODES, SHORTEST_WINDOW
from llama_index_lora_embed.training.checkpointing.resume import NAMES

_T = TypeVar("_T")
# what evaluations of pairs report; those of labels 0 and 1 have both
_OF_BINARY_PAIRS = ("roc_auc", "average_precision", "accuracy")
_OF_PAIRS = ("spearman", "pearson")


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
    continue_from: Any,
    pooling: Any,
    window: Any,
    mining: Any,
    on_overlap: Any,
    allow_changes: Any,
    flags: Mapping[str, Any],
    texts: Mapping[str, Any],
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
        continue_from: None, or an adapter that writing to model_output_path does not touch.
        pooling: None or a pooling's name.
        window: None or a number of tokens.
        mining: None or MiningSettings, whose problems are listed too.
        on_overlap: "error", "drop" or "allow".
        allow_changes: A collection of names of what a checkpoint records.
        flags: Arguments that have to be True or False: use_all_docs, resume_from_checkpoint, quantized.
        texts: Arguments that have to be text or None.

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
    problems += [
        f"{name}={value!r}: expected text or None"
        for name, value in texts.items()
        if not isinstance(value, (str, type(None))) and not (name == "cache_folder" and isinstance(value, os.PathLike))
    ]
    if on_overlap not in ("error", "drop", "allow"):
        problems.append(f"on_overlap={on_overlap!r}: expected 'error', 'drop' or 'allow'")
    if pooling is not None and pooling not in POOLING_MODES:
        problems.append(f"pooling={pooling!r}: expected None or one of {', '.join(POOLING_MODES)}")
    if window is not None and not is_int(window, SHORTEST_WINDOW):
        problems.append(f"window={window!r}: expected None or a whole number of at least {SHORTEST_WINDOW} tokens")
    problems += _problems_of_loss(loss)
    problems += _problems_of_lora(lora_config)
    if flags["quantized"] is True:
        problems += _problems_of_quantising(settings.device)
    for name, value, kind in (("mining", mining, MiningSettings), ("objective", objective, ObjectiveSettings)):
        if isinstance(value, kind):
            problems += value.problems()
        elif value is not None:
            problems.append(f"{name} of type {type(value).__name__}: expected {kind.__name__}")
    problems += _problems_of_names(allow_changes)
    owned = {"lora_config": lora_config, "pooling": pooling, "window": window, "quantized": flags["quantized"] or None}
    problems += _problems_of_continuing(continue_from, model_output_path, owned)
    of_pairs = isinstance(dataset, LabelledPairs)
    problems += _problems_with_data(settings, of_pairs, loss, objective, mining, flags["use_all_docs"])
    judge = dataset if val_dataset is None and settings.val_fraction != 0 else val_dataset
    problems += _problems_of_judging(settings, judge)

    places = [("model_id", model_id, base_model.check_local), ("model_output_path", model_output_path, _check_output)]
    if isinstance(continue_from, (str, os.PathLike)):
        places.append(("continue_from", continue_from, base_model.check_local))
    if isinstance(objective, ObjectiveSettings) and isinstance(objective.teacher, str):
        places.append(("teacher", objective.teacher, base_model.check_local))
    for name, value, check in places:
        if isinstance(value, (str, os.PathLike)) and str(value):
            attempt(lambda check=check, value=value: check(str(value)))  # type: ignore[misc]
        elif name != "continue_from":
            problems.append(f"{name}={value!r}: expected text")
    if problems:
        errors.append(ConfigError(f"{len(problems)} wrong argument(s)", "those named", "Correct them:", problems))
    train = attempt(lambda: _coerce(dataset, "dataset"))
    val = None if val_dataset is None else attempt(lambda: _coerce(val_dataset, "val_dataset"))
    if train is not None and val is not None and on_overlap != "allow":
        both = (train, val)
        train = attempt(lambda: drop_overlap(*both, drop=on_overlap == "drop"))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        listed = [line for error in errors for line in (getattr(error, "problems", None) or [str(error)])]
        raise ConfigError(f"{len(listed)} problem(s)", "arguments without any", "Mend them all:", listed)
    assert train is not None
    return train, val


def rehearsal_set(name: str) -> EmbeddingQAFinetuneDataset:
    """A dataset to check the other arguments with, before there is the real one.

    Args:
        name: What its ids begin with.
    """
    ids = [f"{name}{number}" for number in range(2)]
    return EmbeddingQAFinetuneDataset(
        queries={i: f"query {i}" for i in ids},
        corpus={i: f"text {i}" for i in ids},
        relevant_docs={i: [i] for i in ids},
    )


def _coerce(value: Any, name: str) -> Trainable:
    if isinstance(value, LabelledPairs):
        return value.check(name)
    return EmbeddingQAFinetuneDataset.coerce(value, name).check(name)


def _check_output(path: str) -> None:
    """The adapter directory, and the run directory beside it.

    Raises:
        OutputDirectoryError: One of them cannot be written.
    """
    target = adapter_directory.check_output(path)
    run_dir = target.with_name(target.name + ".run")
    if run_dir.exists() and not run_dir.is_dir():
        raise OutputDirectoryError(
            f"{str(run_dir)!r}, where checkpoints and the log go and which is a file",
            "that place free, or a directory",
            f"Move it, or choose another model_output_path than {target.name!r}.",
        )


def _problems_of_names(allow_changes: Any) -> list[str]:
    if not isinstance(allow_changes, (list, tuple, set, frozenset)) or not all(
        isinstance(name, str) for name in allow_changes
    ):
        return [f"allow_changes={allow_changes!r}: expected names in a list or tuple"]
    if unknown := sorted(set(allow_changes) - NAMES):
        names = ", ".join(sorted(NAMES))
        return [f"allow_changes with {', '.join(map(repr, unknown))}: expected what a checkpoint records: {names}"]
    return []


def _problems_of_continuing(continue_from: Any, output_path: Any, owned: Mapping[str, Any]) -> list[str]:
    """What speaks against training an adapter further.

    Args:
        continue_from: The adapter.
        output_path: Adapter directory.
        owned: What the adapter was made with and cannot be chosen again.
    """
    if continue_from is None:
        return []
    if not isinstance(continue_from, (str, os.PathLike)) or not str(continue_from):
        return [f"continue_from={continue_from!r}: expected the path or Hub id of an adapter"]
    problems = []
    folder = Path(absolute(continue_from))
    if folder.is_dir():
        if isinstance(output_path, (str, os.PathLike)) and (place := _endangers(output_path, folder)):
            problems.append(f"continue_from={str(continue_from)!r}, {place}: expected a new directory to write to")
        if not (folder / adapter_directory.CONFIG_NAME).exists():
            problems.append(
                f"continue_from={str(continue_from)!r}, a folder without {adapter_directory.CONFIG_NAME}: expected an "
                "adapter; a base goes into model_id"
            )
    return problems + [
        f"{name} with continue_from: expected none, because the adapter was made with its own"
        for name, value in owned.items()
        if value is not None
    ]


def _endangers(output_path: str | os.PathLike[str], folder: Path) -> str:
    """Why writing there would destroy a folder, links followed; "" if it would not."""
    target = Path(output_path).expanduser().resolve()
    previous, run_dir = (target.with_name(target.name + end) for end in (".previous", ".run"))
    for place in (folder.resolve(), folder.parent.resolve() / folder.name):
        within = (place, *place.parents)
        if target in within:
            return "the same as model_output_path"
        if previous in within:
            return "where the adapter at model_output_path is moved to"
        if run_dir in within:
            return "in the run directory of model_output_path"
    return ""


def absolute(path: str | os.PathLike[str]) -> str:
    """A folder's absolute path, so that a changed working directory changes nothing; a Hub id as it is."""
    text = os.path.expanduser(os.fspath(path))
    return os.path.abspath(text) if os.path.exists(text) else text


def _problems_with_data(
    settings: TrainingSettings, pairs: bool, loss: Any, objective: Any, mining: Any, use_all_docs: Any
) -> list[str]:
    """What does not go with labelled pairs, with questions, or with a loss of the user's own."""
    problems = []
    if pairs and mining is not None:
        problems.append("mining with labelled pairs: expected None, because pairs bring their own negatives")
    if pairs and use_all_docs:
        problems.append("use_all_docs=True with labelled pairs: expected False, because they have no documents")
    wanted = ObjectiveSettings() if objective is None else objective
    if not isinstance(wanted, ObjectiveSettings):
        return problems
    if not wanted.problems():
        problems += wanted.misfits(pairs=pairs, own_loss=loss is not None)
    name = wanted.name_for(pairs)
    if settings.batch_size == 1 and loss is None and name in (*IN_BATCH, "cosent"):
        why = "pairs are compared with the others" if name == "cosent" else "a passage's negatives are the others"
        problems.append(f"batch_size=1: expected at least 2, because {why} of their batch")
    return problems


def _problems_of_judging(settings: TrainingSettings, judge: Any) -> list[str]:
    """What cannot be done with what there is to judge by.

    Args:
        settings: Has best_metric and early_stopping_patience.
        judge: Validation set, or what one is held out of; None if there is nothing.
    """
    wanted = {"best_metric": settings.best_metric, "early_stopping_patience": settings.early_stopping_patience}
    if judge is None:
        return [
            f"{name}={value!r} without anything to judge by: expected a val_dataset, or val_fraction above 0"
            for name, value in wanted.items()
            if value
        ]
    if isinstance(judge, LabelledPairs):
        known: tuple[str, ...] = (*_OF_BINARY_PAIRS, *_OF_PAIRS) if judge.binary else _OF_PAIRS
    else:
        known = metrics.NAMES
    metric = settings.best_metric
    if not isinstance(metric, str) or not metric.strip() or metric in known:
        return []
    return [f"best_metric={metric!r}: expected one of {', '.join(known)}, which the evaluation reports, or None"]


def _problems_of_loss(loss: Any) -> list[str]:
    """Without importing torch: who holds a loss has imported it."""
    if loss is None:
        return []
    expected = "expected a sentence-transformers loss, or a callable that makes one from the model"
    if not callable(loss):
        return [f"loss of type {type(loss).__name__}: {expected}"]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(loss, torch.nn.Module):
        return [] if hasattr(loss, "model") else [f"loss of type {type(loss).__name__} without .model: {expected}"]
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    if isinstance(loss, type) and (torch is None or not issubclass(loss, torch.nn.Module)):
        return [f"loss={name}: {expected}"]
    try:
        inspect.signature(loss).bind(object())
    except TypeError as error:
        return [f"loss={name}, which cannot be called with the model alone ({error}): {expected}; "
                "functools.partial gives it the rest"]  # fmt: skip
    except ValueError:  # written in C, which tells no signature
        return []
    return []


def _problems_of_lora(value: Any) -> list[str]:
    """Without importing peft, unless a LoraConfig is there: who holds one has imported it."""
    if value is None:
        return []
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(value, peft.LoraConfig):
        return [f"lora_config of type {type(value).__name__}: expected peft.LoraConfig"]
    from llama_index_lora_embed.training.lora import lora_problems

    return lora_problems(value)


def _problems_of_quantising(device: Any) -> list[str]:
    """Why there can be no base in 4 bit, as far as it shows without importing torch."""
    expected = "expected a CUDA device, where 4-bit layers are computed"
    if isinstance(device, str) and device.partition(":")[0] != "cuda":
        return [f"quantized=True with device={device!r}: {expected}"]
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        return [f"quantized=True on a machine without one: {expected}"]
    return []


def check_device(device: str | None, quantized: bool) -> None:
    """Whether the device is there; imports torch.

    Raises:
        ConfigError: It is a CUDA device, or needs to be one, and this machine has none.
        MissingExtraError: A base in 4 bit is asked for, and bitsandbytes is not installed.
    """
    import torch

    problems = _problems_of_quantising(device) if quantized else []
    there = torch.cuda.device_count()
    kind, _, number = (device or "").partition(":")
    if kind == "cuda" and int(number or 0) >= there:
        problems.append(f"device={device!r} on a machine with {there} CUDA device(s): expected one that is there")
    if problems:
        raise ConfigError("a device that is not there", "one of this machine", "Choose another:", problems)
    if quantized:
        require("bitsandbytes")
