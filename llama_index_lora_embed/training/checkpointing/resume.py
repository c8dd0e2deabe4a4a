"""The resume check: what a checkpoint records of a run, and a resumed run must have in common with it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.config.finetune import OutputSettings
from llama_index_lora_embed.data.training_data import TrainingData

if TYPE_CHECKING:
    from peft import LoraConfig

    from llama_index_lora_embed.data.stored_vectors import StoredVectors
    from llama_index_lora_embed.models.base_model import BaseInfo

RECORDED = frozenset({
    *FinetuneConfig().result_affecting(),
    *("base", "continue_from", "dataset", "val_dataset", "passages", "loss", "train_kwargs", "round", "start"),
    "teacher_scores",
})  # fmt: skip
"""Names of everything that is compared; `round` and `start` are recorded where negatives are mined, `teacher_scores`
where a teacher's scores are learnt."""

# these fields of peft's configuration say where files are and which peft wrote them
_LORA_PLACES = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
_REPORTING = ("report_to", "run_name", "log_level", "dataloader_num_workers", "dataloader_pin_memory")
_SCALARS = (int, float, str, bool, type(None))
_LONGEST = 2000  # characters of a loss's description


def record(
    config: FinetuneConfig,
    dataset: TrainingData,
    val_dataset: TrainingData | None,
    *,
    base: BaseInfo,
    parent: Mapping[str, Any] | None,
    loss: Any,
    train_kwargs: Mapping[str, Any],
    stored: StoredVectors | None = None,
) -> dict[str, Any]:
    """Everything that decides the trained weights, by name, in values that JSON returns unchanged.

    `parent` holds path and fingerprint of the adapter that is continued; `dataset` is the training data before mining;
    `stored` are the passages' vectors of an index.
    """
    affecting = config.result_affecting()
    described = describe(loss)
    text = json.dumps(described, sort_keys=True)
    arguments = {
        n: v for n, v in train_kwargs.items() if n not in _REPORTING and not n.startswith(("logging_", "hub_"))
    }
    return {
        **affecting,
        "objective": {**affecting["objective"], "name": config.objective.name_for(dataset.kind == "pairs")},
        "base": base.weights_sha256,
        "continue_from": None if parent is None else parent["fingerprint"],
        "dataset": dataset.order_digest(),
        "val_dataset": None if val_dataset is None else val_dataset.order_digest(),
        "passages": None if stored is None else stored.digest(),
        "loss": described if len(text) < _LONGEST else hashlib.sha256(text.encode()).hexdigest(),
        "train_kwargs": describe(arguments),
    }


def resume_problems(output: OutputSettings) -> list[str]:
    """Why the named checkpoint cannot be resumed from, if one is named: it must be this run's."""
    wanted = output.resume_from_checkpoint
    if isinstance(wanted, bool):
        return []
    target, place = (Path(path).expanduser().resolve() for path in (output.model_output_path, wanted))
    run_dir = target.with_name(target.name + ".run")
    if place.is_dir() and run_dir in (place, *place.parents):
        return []
    return [
        f"resume_from_checkpoint={wanted!r}: expected True, False or a folder {str(run_dir / 'checkpoint-<step>')!r}; "
        "continue_from= starts from an adapter of another run"
    ]


def lora_fields(lora_config: LoraConfig) -> dict[str, Any]:
    """The fields of peft's configuration that decide what is trained, as JSON values; defaults are left out."""
    from peft import LoraConfig

    default, values = (config.to_dict() for config in (LoraConfig(), lora_config))  # type: ignore[no-untyped-call]
    return {
        name: describe(value)
        for name, value in values.items()
        if name not in _LORA_PLACES and (name not in default or value != default[name])
    }


def describe(value: Any) -> Any:
    """A loss or an argument by its name and its settings, in JSON values that are the same in every process.

    Functions and classes are named, not read: one that does something else under the same name is taken for the same.
    """
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(describe, value), key=str)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, functools.partial):
        return {"partial": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    if isinstance(value, type):
        return value.__qualname__
    if hasattr(value, "__qualname__"):  # a function or a method, with the values that it was made with
        closure = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        made_with = [closure, getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None)]
        return {"function": value.__qualname__, "values": [_settings(part) for part in made_with]}
    return {"class": type(value).__qualname__, "settings": _settings(value)}


def _settings(value: Any) -> Any:
    """What an object says of its settings; models and other objects in it are named by their class alone."""
    if hasattr(value, "get_config_dict"):  # a loss of sentence-transformers; losses in it are its children
        from sentence_transformers import SentenceTransformer

        inner = value.named_children() if hasattr(value, "named_children") else ()
        losses = {n: m for n, m in inner if hasattr(m, "get_config_dict") and not isinstance(m, SentenceTransformer)}
        return {"config": describe(value.get_config_dict()), **{name: describe(loss) for name, loss in losses.items()}}
    if isinstance(value, (list, tuple, Mapping, set, frozenset, functools.partial, *_SCALARS)):
        return describe(value)
    attributes = sorted(getattr(value, "__dict__", {}).items())
    return {name: item if isinstance(item, _SCALARS) else type(item).__qualname__ for name, item in attributes}
