"""What a checkpoint records of a run's data and settings; a run that resumes from it must have the same."""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.config import MiningSettings, ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.data import LabelledPairs
from llama_index_lora_embed.data.split import Trainable

if TYPE_CHECKING:
    from peft import LoraConfig

    from llama_index_lora_embed.models.base_model import BaseInfo

_OF_SETTINGS = TrainingSettings().result_affecting().keys()
NAMES = frozenset({
    *("base", "continue_from", "dataset", "val_dataset", "lora_config", "loss", "objective", "use_all_docs", "mining"),
    *("pooling", "window", "quantized", "query_prompt", "passage_prompt", "train_kwargs", "round", "start"),
    *_OF_SETTINGS,
})  # fmt: skip
"""Of everything that is compared; `round` and `start` are there where negatives are mined."""

# where files lie and which peft wrote them decide nothing
_OF_PLACE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
_DEPTH = 4  # of objects in objects
_LONG = 2000  # characters


@dataclass(frozen=True)
class Recorded:
    """A run's data and settings.

    Attributes:
        settings: Of the training.
        dataset: Training set, before mining.
        val_dataset: What it is judged by.
        lora_config: peft's own, or None.
        loss: The user's own, or None.
        objective: What is trained, or None for the default.
        mining: How negatives are mined, or None.
        options: More arguments of the engine, by name.
    """

    settings: TrainingSettings
    dataset: Trainable
    val_dataset: Trainable | None
    lora_config: LoraConfig | None
    loss: Any
    objective: ObjectiveSettings | None
    mining: MiningSettings | None
    options: Mapping[str, Any]

    def as_values(self, base: BaseInfo, parent: dict[str, Any] | None, train_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Plain values by name, which are the same again after JSON.

        Args:
            base: The base model.
            parent: Path and fingerprint of the adapter that is continued, if any.
            train_kwargs: The user's own training arguments.
        """
        pairs = isinstance(self.dataset, LabelledPairs)
        lora: Any = self.lora_config
        return {
            "base": base.weights_sha256,
            "continue_from": None if parent is None else parent["fingerprint"],
            "dataset": _digest(self.dataset),
            "val_dataset": None if self.val_dataset is None else _digest(self.val_dataset),
            "lora_config": None if lora is None else _plain(_without(lora.to_dict(), _OF_PLACE)),
            "loss": _short(describe(self.loss)),
            "objective": _plain((self.objective or ObjectiveSettings()).result_affecting(pairs)),
            "mining": None if self.mining is None else _plain(self.mining.result_affecting()),
            **self.options,
            **_plain(self.settings.result_affecting()),
            "train_kwargs": _lasting(train_kwargs),
        }


def describe(value: Any, depth: int = _DEPTH) -> Any:
    """A function, class or object by what it does, in plain values that are the same in every process.

    Functions are told by their names and their code, what they close over included, but not by the line that they
    stand in; objects by their class and what `get_config_dict()` says, or their attributes; a `functools.partial` by
    its parts.
    """
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    if isinstance(value, type):
        return value.__qualname__
    if depth == 0:
        return type(value).__qualname__

    def inside(part: Any) -> Any:
        return describe(part, depth - 1)

    if isinstance(value, Mapping):
        return {str(key): inside(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((inside(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [inside(item) for item in value]
    if isinstance(value, functools.partial):
        return {"partial": inside(value.func), "args": inside(value.args), "keywords": inside(value.keywords)}
    if isinstance(value, types.MethodType):
        return {"method": inside(value.__func__), "of": inside(value.__self__)}
    if isinstance(value, types.FunctionType):
        closed = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        kept = {name: inside(_content(cell)) for name, cell in closed.items()}
        defaults = inside([value.__defaults__, value.__kwdefaults__])
        return {"function": value.__qualname__, "code": _code(value.__code__), "closed": kept, "defaults": defaults}
    return {"class": type(value).__qualname__, **_attributes(value, depth - 1)}


def _attributes(value: Any, depth: int) -> dict[str, Any]:
    """What decides what an object does, as far as it tells; weights and models are not looked into."""
    told: dict[str, Any] = {}
    if hasattr(value, "named_children"):  # a torch module
        from sentence_transformers import SentenceTransformer

        inner = value.named_children()  # a loss in a loss
        told = {n: m for n, m in inner if hasattr(m, "get_config_dict") and not isinstance(m, SentenceTransformer)}
        told |= {"config": value.get_config_dict()} if hasattr(value, "get_config_dict") else {}
    elif hasattr(value, "get_config_dict"):
        told = {"config": value.get_config_dict()}
    else:
        told = getattr(value, "__dict__", {})
    return {str(name): describe(item, depth) for name, item in sorted(told.items())}


def _short(described: Any) -> Any:
    """A description, or its digest where it is longer than one wants to read."""
    text = json.dumps(described, sort_keys=True)
    return described if len(text) < _LONG else hashlib.sha256(text.encode()).hexdigest()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _code(code: types.CodeType) -> str:
    """Digest of what a function does; not of where it stands."""
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(describe(c)) for c in code.co_consts]
    text = repr([code.co_code.hex(), constants, code.co_names, code.co_varnames])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(data: Trainable) -> str:
    """With the order, which decides what batches hold; that of labelled pairs has it already."""
    return data.digest() if isinstance(data, LabelledPairs) else data.order_digest()


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _plain(value: Any) -> Any:
    """Sets as sorted lists, enums as text, so that JSON gives back what it was given."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _lasting(train_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a user's own training arguments that decide what is learnt, as plain values."""
    passing = ("report_to", "run_name", "log_level", "dataloader_num_workers", "dataloader_pin_memory")
    kept = _without(train_kwargs, passing)
    return {name: describe(value) for name, value in kept.items() if not name.startswith(("logging_", "hub_"))}
