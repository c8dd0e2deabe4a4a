"""A run's configuration and data checked together, all problems at once, before anything heavy is loaded."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index_lora_embed.config import IN_BATCH, MANIFEST_NAME, FinetuneConfig
from llama_index_lora_embed.core.errors import (
    ConfigError,
    LoraEmbedError,
    OutputDirectoryError,
    attempt,
    raise_together,
)
from llama_index_lora_embed.core.files import absolute
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data.training_data import (
    TrainingData,
    coerce_training_data,
    from_huggingface,
    refuse_overlap,
    without_trained,
)
from llama_index_lora_embed.engines.teacher import check_local_teacher, teacher_problems
from llama_index_lora_embed.evaluation import metrics
from llama_index_lora_embed.models import adapter_directory, base_model
from llama_index_lora_embed.training.checkpointing.resume import RECORDED, resume_problems

# metrics of labelled pairs; those of labels 0 and 1 have both
BINARY_PAIR_METRICS = ("roc_auc", "average_precision", "accuracy")
PAIR_METRICS = ("spearman", "pearson")
_GROUP = re.compile(r"(?:(?:data|base|training|output)\.)?(\w+)")


@dataclass(frozen=True)
class CheckedRun:
    """What can be run.

    Attributes:
        config: With absolute paths.
        dataset: Checked training data; None where only the configuration was checked.
        val_dataset: Checked validation data, without what is trained on; None where there is none.
        overlap_note: How much of the validation data is trained on, in a sentence; "" for nothing.
    """

    config: FinetuneConfig
    dataset: TrainingData | None
    val_dataset: TrainingData | None
    overlap_note: str = ""


def check_run(
    config: FinetuneConfig | Mapping[str, Any],
    dataset: Any = None,
    val_dataset: Any = None,
    *,
    loss: Any = None,
    lora_config: Any = None,
    teacher: Any = None,
) -> CheckedRun:
    """The run, if everything about it can be used.

    Args:
        config: A configuration, or flat arguments of one (`FinetuneConfig.from_arguments`).
        dataset: Training data, anything that `coerce_training_data` or `from_huggingface` takes; None checks the rest
            before there is any, as for queries and passages.
        val_dataset: Validation data, or None.
        loss: None, a sentence-transformers loss, or a callable that makes one from the model.
        lora_config: None or a `peft.LoraConfig`.
        teacher: None, a `CrossEncoder`, or a function of (query, passage) pairs, instead of `config.teacher`; with
            `tune="query"` an embedding model.

    Raises:
        LoraEmbedError: The one kind of problem there is; for several kinds a ConfigError that lists them all.
    """
    errors: list[LoraEmbedError] = []
    dataset = attempt(lambda: from_huggingface(dataset, "dataset"), errors)
    val_dataset = attempt(lambda: from_huggingface(val_dataset, "val_dataset"), errors)

    problems: list[str] = []
    if not isinstance(config, FinetuneConfig):
        config, problems = _valid_part(config)
    kind, val_kind = (getattr(data, "kind", "queries") for data in (dataset, val_dataset))
    problems += _loss_problems(loss) + _lora_problems(lora_config)
    problems += quantization_problems(config) if config.base.quantized else []
    problems += _continue_problems(config, lora_config)
    problems += _scale_problems(config, lora_config)
    problems += _tune_problems(config, kind == "pairs", loss)
    problems += _allow_changes_problems(config) + resume_problems(config.output)
    problems += _data_problems(config, kind == "pairs", loss)
    if val_dataset is not None or not config.data.val_fraction:
        problems += _metric_problems(config, val_dataset, val_kind)
    else:
        problems += _metric_problems(config, dataset, kind, held_out=True)

    teacher = config.teacher if teacher is None else teacher
    problems += teacher_problems(config, teacher, pairs=kind == "pairs", own_loss=loss is not None)
    query_side = config.training.tune == "query"
    if teacher is not None and not query_side:
        config = attempt(config.for_teacher, errors) or config

    attempt(lambda: base_model.check_local(config.base.model_id), errors)
    attempt(lambda: check_run_directory(adapter_directory.check_output(config.output.model_output_path)), errors)
    if config.base.continue_from is not None:
        attempt(lambda: base_model.check_local(str(config.base.continue_from)), errors)
    if isinstance(teacher, str):
        attempt(lambda: check_local_teacher(teacher, query_side=query_side), errors)
    if problems:
        errors.append(ConfigError(f"{len(problems)} wrong argument(s)", "those named", "Correct them:", problems))
    train = None if dataset is None else attempt(lambda: coerce_training_data(dataset, "dataset"), errors)
    val = None if val_dataset is None else attempt(lambda: coerce_training_data(val_dataset, "val_dataset"), errors)
    note = ""
    if train is not None and val is not None:
        if config.data.on_overlap == "raise":
            both = (train, val)
            attempt(lambda: refuse_overlap(*both), errors)
        else:
            val, note = without_trained(train, val)
            if val is None and (misfits := _metric_problems(config, train, kind, held_out=True)):
                errors.append(ConfigError(f"{len(misfits)} wrong argument(s)", "those named", note, misfits))
    raise_together(errors)
    return CheckedRun(config.with_absolute_paths(), train, val, note)


def check_written(path: str) -> None:
    """Check that a run has written its directory.

    Raises:
        OutputDirectoryError: It has not.
    """
    if not os.path.exists(os.path.join(path, MANIFEST_NAME)):
        raise OutputDirectoryError(
            f"model_output_path {path!r} without an adapter in it",
            "the directory that finetune() writes",
            "Call engine.finetune() first.",
        )


def check_loss(config: FinetuneConfig, loss: Any, *, pairs: bool) -> None:
    """Check a loss of the user's own that comes after the run was checked.

    Raises:
        ConfigError: It is no loss, or does not go with the objective.
    """
    problems = _loss_problems(loss) + _data_problems(config, pairs, loss)
    problems += _tune_problems(config, pairs, loss)
    if problems:
        raise ConfigError(f"{len(problems)} wrong argument(s)", "those named", "Correct them:", problems)


def _valid_part(arguments: Mapping[str, Any]) -> tuple[FinetuneConfig, list[str]]:
    """The configuration of those arguments that are right, and one line for each that is wrong."""
    kept, problems = dict(arguments), list[str]()
    while True:
        try:
            return FinetuneConfig.from_arguments(**kept), problems
        except ConfigError as error:
            problems += error.problems
            for line in error.problems:
                name = _GROUP.match(line).group(1)  # type: ignore[union-attr]  # every line begins with its path
                kept.pop(name, None)


def check_run_directory(target: Path) -> None:
    """Check that the run directory beside an output directory can be one.

    Raises:
        OutputDirectoryError: It is a file.
    """
    run_dir = target.with_name(target.name + ".run")
    if run_dir.exists() and not run_dir.is_dir():
        raise OutputDirectoryError(
            f"{str(run_dir)!r}, which is a file",
            "a free path, or a directory, for checkpoints and the log",
            f"Move the file, or choose another model_output_path than {target.name!r}.",
        )


def _scale_problems(config: FinetuneConfig, lora_config: Any) -> list[str]:
    """Why the trained change cannot be scaled; `training.lora.check_scalable` looks at the weights themselves."""
    scale, lora = config.training.adapter_scale, config.lora_config or {}
    fields = {name: getattr(lora_config, name, lora.get(name)) for name in ("use_dora", "modules_to_save", "bias")}
    conflicts = [f"{name}={value!r}" for name, value in fields.items() if value and value != "none"]
    if config.base.continue_from is not None:
        conflicts.append("continue_from")
    if config.mining is not None and config.mining.rounds > 1:
        conflicts.append(f"mining rounds={config.mining.rounds}")
    if scale == 1 or not conflicts:
        return []
    return [
        f"adapter_scale={scale} with {', '.join(conflicts)}: expected 1.0; LoraEmbedding(adapter_scale=) scales later"
    ]


def _tune_problems(config: FinetuneConfig, pairs: bool, loss: Any) -> list[str]:
    """What does not go with `tune="query"`, where passages keep their vectors and every step sees all; or needs it."""
    base, training, objective = config.base, config.training, config.objective
    if training.tune != "query":
        chosen = f"negatives={training.negatives!r}"
        return [] if training.negatives == "auto" else [f"{chosen} with tune={training.tune!r}: expected tune='query'"]
    passages = "expected {}, because the passages keep their vectors"
    negatives = "expected {}, because every step compares its queries with the whole corpus"
    found = [
        ("labelled pairs", pairs, "expected queries and passages, one side of which keeps its vectors"),
        ("a loss", loss is not None, negatives.format("None")),
        ("mining", config.mining is not None, negatives.format("None")),
        (f"objective {objective.name!r}", objective.name not in (None, *IN_BATCH), negatives.format("the default")),
        ("guide=True", objective.guide, "expected False: masks of passages that are alike are in effect"),
        ("matryoshka_dims", objective.matryoshka_dims is not None, passages.format("None")),
        ("max_seq_length", training.max_seq_length is not None, passages.format("None")),
        ("window", base.window not in (None, "auto"), passages.format("None")),
        ("quantized=True", base.quantized, "expected False: the base must embed passages as the index does"),
    ]  # fmt: skip
    return [f'{name} with tune="query": {expected}' for name, wrong, expected in found if wrong]


def _allow_changes_problems(config: FinetuneConfig) -> list[str]:
    unknown = sorted(set(config.output.allow_changes) - RECORDED)
    if not unknown:
        return []
    return [
        f"allow_changes with {', '.join(map(repr, unknown))}: expected names that a checkpoint records: "
        f"{', '.join(sorted(RECORDED))}"
    ]


def _continue_problems(config: FinetuneConfig, lora_config: Any) -> list[str]:
    """Why an adapter cannot be trained further into this output directory."""
    base = config.base
    if base.continue_from is None:
        return []
    problems = []
    folder = Path(absolute(base.continue_from))
    if folder.is_dir():
        if conflict := _overwrites(config.output.model_output_path, folder):
            problems.append(f"continue_from={base.continue_from!r}, {conflict}: expected another model_output_path")
        if not (folder / adapter_directory.CONFIG_NAME).exists():
            problems.append(
                f"continue_from={base.continue_from!r}, a folder without {adapter_directory.CONFIG_NAME}: expected an "
                "adapter; a base goes into model_id"
            )
    given = {"lora_config": lora_config or config.lora_config, "quantized": base.quantized or None}
    if (folder / "modules.json").exists():  # an adapter of peft alone records neither
        given |= {"pooling": base.pooling, "window": None if base.window == "auto" else base.window}
    return problems + [
        f"{name} with continue_from: expected None, because the adapter keeps what it was made with"
        for name, value in given.items()
        if value is not None
    ]


def _overwrites(output_path: str | os.PathLike[str], folder: Path) -> str:
    """Why writing there would destroy a folder, links followed; "" if it would not."""
    target = Path(output_path).expanduser().resolve()
    previous, run_dir = (target.with_name(target.name + end) for end in (".previous", ".run"))
    for place in (folder.resolve(), folder.parent.resolve() / folder.name):
        within = (place, *place.parents)
        if target in within:
            return "which is model_output_path itself"
        if previous in within:
            return "which is where the adapter at model_output_path is moved to"
        if run_dir in within:
            return "which is in the run directory of model_output_path"
    return ""


def _data_problems(config: FinetuneConfig, pairs: bool, loss: Any) -> list[str]:
    """What cannot be combined with this kind of data, or with a loss of the user's own."""
    problems = []
    if pairs and config.mining is not None:
        problems.append("mining with labelled pairs: expected None, because pairs bring their own negatives")
    if pairs and config.data.use_all_docs:
        problems.append("use_all_docs=True with labelled pairs: expected False, because they have no documents")
    objective = config.objective
    problems += objective.misfits(pairs=pairs, own_loss=loss is not None)
    name = objective.name_for(pairs)
    if config.training.batch_size == 1 and loss is None and name in (*IN_BATCH, "cosent"):
        why = "pairs are compared with the others" if name == "cosent" else "a passage's negatives are the others"
        problems.append(f"batch_size=1: expected at least 2, because {why} of their batch")
    return problems


def _metric_problems(config: FinetuneConfig, data: Any, kind: str, held_out: bool = False) -> list[str]:
    """Whether the evaluation that chooses the step exists and reports the metric.

    Args:
        config: Has best_metric and early_stopping_patience.
        data: Validation data, or what it is held out of.
        kind: Of the data.
        held_out: Whether validation data will be held out.
    """
    training = config.training
    if data is None and not held_out:
        wanted = {"best_metric": training.best_metric, "early_stopping_patience": training.early_stopping_patience}
        return [
            f"{name}={value!r} without validation data: expected a val_dataset, or val_fraction above 0"
            for name, value in wanted.items()
            if value
        ]
    known: tuple[str, ...] = metrics.NAMES
    if kind == "pairs":
        known = (*BINARY_PAIR_METRICS, *PAIR_METRICS) if data.binary else PAIR_METRICS
    if training.best_metric is None or training.best_metric in known:
        return []
    return [f"best_metric={training.best_metric!r}: expected one of {', '.join(known)}, or None"]


def _loss_problems(loss: Any) -> list[str]:
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
    except ValueError:  # written in C, without a signature
        return []
    return []


def _lora_problems(value: Any) -> list[str]:
    """Without importing peft, unless a LoraConfig is there: who holds one has imported it."""
    if value is None:
        return []
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(value, peft.LoraConfig):
        return [f"lora_config of type {type(value).__name__}: expected peft.LoraConfig"]
    from llama_index_lora_embed.training.lora import lora_problems

    return lora_problems(value)


def quantization_problems(config: FinetuneConfig) -> list[str]:
    """Why the base cannot be held in 4 bit, as far as it shows without importing torch."""
    expected = "expected a CUDA device, where 4-bit layers are computed"
    device = config.training.device
    if device is not None and device.partition(":")[0] != "cuda":
        return [f"quantized=True with device={device!r}: {expected}"]
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        return [f"quantized=True on a machine without one: {expected}"]
    return []


def check_device(config: FinetuneConfig) -> None:
    """Check that the device exists; imports torch.

    Raises:
        ConfigError: It is a CUDA device, or needs to be one, and this machine has none.
        MissingExtraError: The base is to be held in 4 bit, and bitsandbytes is not installed.
    """
    import torch

    problems = quantization_problems(config) if config.base.quantized else []
    count, device = torch.cuda.device_count(), config.training.device
    kind, _, number = (device or "").partition(":")
    if kind == "cuda" and int(number or 0) >= count:
        problems.append(f"device={device!r} on a machine with {count} CUDA device(s): expected one that it has")
    if problems:
        raise ConfigError("a device that does not exist", "one of this machine", "Choose another:", problems)
    if config.base.quantized:
        require("bitsandbytes")
