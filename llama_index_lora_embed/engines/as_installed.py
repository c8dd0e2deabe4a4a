"""The starting model as installed, beside the same model as the run reads texts with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import DeviceMemoryError
from llama_index_lora_embed.engines.evaluator import longest_text
from llama_index_lora_embed.models.adapter_directory import describe_modules
from llama_index_lora_embed.models.pooling import pooling_of
from llama_index_lora_embed.models.windows import window_of
from llama_index_lora_embed.training.checkpointing.selection import Evaluation, Installed
from llama_index_lora_embed.training.lora import adapter_weights, restore_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch.nn import Parameter

    from llama_index_lora_embed.data.training_data import TrainingData


@dataclass(frozen=True)
class Reading:
    """What decides a model's vectors besides its weights."""

    max_seq_length: int
    prompts: tuple[str, str]
    window: int | None
    pooling: str | None
    modules: list[dict[str, Any]]

    @classmethod
    def of(cls, model: SentenceTransformer) -> Reading:
        """That of a model."""
        query, passage = (model.prompts.get(name) or "" for name in ("query", "document"))
        modules = describe_modules(model)
        return cls(model.max_seq_length or 0, (query, passage), window_of(model), pooling_of(model), modules)

    def changed_from(self, own: Reading) -> str:
        """What differs from `own`, in words for a table: "512 tokens", "windows of 512 tokens, other prompts"."""
        parts = []
        if self.window != own.window:
            parts.append(f"windows of {self.window} tokens")
        elif self.max_seq_length != own.max_seq_length:
            parts.append(f"{self.max_seq_length} tokens")
        if self.pooling != own.pooling:
            parts.append(f"{self.pooling} pooling")
        if self.prompts != own.prompts:
            parts.append("other prompts")
        return ", ".join(parts)


@dataclass(frozen=True)
class AsInstalled:
    """The starting model as `LoraEmbedding` loads it without further arguments; a continued adapter as it was saved.

    With `tune="query"`, pooling and passage prompt are the run's, because the index that stays was built with them.

    Attributes:
        prompts: Its own.
        max_seq_length: Its own.
        load: Loads it anew on a `device` where the run has other modules, which cannot be switched back; None where
            only prompts and length may differ.
    """

    prompts: Mapping[str, Any]
    max_seq_length: int | None
    load: Callable[..., SentenceTransformer] | None = None

    @contextmanager
    def within(self, model: SentenceTransformer) -> Iterator[SentenceTransformer]:
        """The starting model as installed: the run's model with its own settings for the time, or one beside it.

        One beside it has no adapter, and shares the run's weights.

        Raises:
            DeviceMemoryError: The weights that cannot be shared do not fit into the device's memory.
        """
        if self.load is not None:
            yield _beside(self.load, model)
            return
        prompts, length = dict(model.prompts), model.max_seq_length
        model.prompts, model.max_seq_length = dict(self.prompts), self.max_seq_length
        try:
            yield model
        finally:
            model.prompts, model.max_seq_length = prompts, length

    @contextmanager
    def to_write(self, model: SentenceTransformer) -> Iterator[SentenceTransformer]:
        """The same with the run's adapter on it, which must have its starting weights."""
        with self.within(model) as own:
            if own is not model:
                own.add_adapter(copy.deepcopy(model.transformers_model.peft_config["default"]))  # type: ignore[union-attr]
                restore_weights(own, adapter_weights(model))
                own.eval()
            yield own

    def evaluate(
        self, model: SentenceTransformer, dataset: TrainingData, evaluate: Callable[[SentenceTransformer], Evaluation]
    ) -> Installed | None:
        """Evaluate the starting model as installed; None where the run's model reads this dataset in the same way.

        Args:
            model: The run's model with the weights that it starts from.
            dataset: What it is evaluated on.
            evaluate: Evaluates a model on the dataset.
        """
        now = Reading.of(model)
        with self.within(model) as installed:
            own = Reading.of(installed)
            shorter = min(now.max_seq_length, own.max_seq_length)
            same = replace(now, max_seq_length=shorter) == replace(own, max_seq_length=shorter)
            if now == own or (same and longest_text(installed, dataset) <= shorter):
                return None
            return Installed(evaluate(installed), now.changed_from(own))


def _beside(load: Callable[..., SentenceTransformer], model: SentenceTransformer) -> SentenceTransformer:
    """A model that is loaded in main memory, then takes the weights of the run's model where they are equal.

    A device holds them once. Those of a base in 4 bit, or in another precision, are not equal.
    """
    import torch

    own = load(device="cpu")
    theirs = {name.replace(".base_layer.", "."): tensor for name, tensor in _weights(model).items()}
    for name, parameter in _weights(own).items():
        other = theirs.get(name)
        same = other is not None and (other.shape, other.dtype) == (parameter.shape, parameter.dtype)
        if other is not None and same and torch.equal(parameter.to(other.device), other):
            parameter.data = other.data
    try:
        return own.to(model.device)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"too little memory on {model.device} for the base as installed beside the base of the run ({error})",
            "room for both, because the run has another pooling or windows, and a base in 4 bit shares no weights",
            "Free device memory that other programs use, or train with quantized=False, a smaller base, or without "
            "window= and pooling=.",
        ) from error


def _weights(model: SentenceTransformer) -> dict[str, Parameter]:
    """The parameters of the transformer by name; empty for a model without one."""
    transformer = model.transformers_model
    return {} if transformer is None else dict(transformer.named_parameters())
