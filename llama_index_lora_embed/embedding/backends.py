"""What computes the vectors of a `LoraEmbedding`: a model of its own, one of many adapters, or an exported model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import AdapterError, ConfigError
from llama_index_lora_embed.embedding.adapter_pool import AdapterPool, PooledAdapter
from llama_index_lora_embed.embedding.encode import Task, Vectors, encode
from llama_index_lora_embed.embedding.exported import EXPORT_NAME, Export, ExportedModel
from llama_index_lora_embed.models.adapter_directory import Manifest, fingerprint, normalises
from llama_index_lora_embed.models.base_model import describe_base, load_base
from llama_index_lora_embed.models.lora_adapter import load_adapter
from llama_index_lora_embed.models.opened_adapter import OpenedAdapter, open_adapter
from llama_index_lora_embed.models.pooling import pooling_of
from llama_index_lora_embed.models.tokens import count_tokens

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

_SIDES = {"query": "query", "passage": "document"}  # in this package's words, and in sentence-transformers'
_PROMPTS = ("query_prompt", "passage_prompt")
_BASE_ARGUMENTS = ("device", "trust_remote_code", "pooling", "window", "truncate_dim")


class EmbeddingBackend:
    """A loaded model that turns texts into vectors; all methods may be called from several threads.

    Attributes:
        model: What `encode` computes with.
        fingerprint: Digest of everything that determines the vectors.
        passage_fingerprint: The same for the vectors of passages alone, where queries have an adapter of their own;
            otherwise the fingerprint.
        manifest: The adapter's manifest; None if there is none.
        lock: Held while the model or its tokenizer is in use; fast tokenizers change their truncation in each call.
        fused: Whether `encode` may use oneDNN's products.
    """

    fingerprint: str
    manifest: Manifest | None = None
    fused = True

    def __init__(self, model: Any, truncate_dim: int | None = None) -> None:
        self.model = model
        self.lock: AbstractContextManager[Any] = threading.RLock()
        # sentence-transformers truncates after the model's own normalisation
        self._unit_length = truncate_dim is not None and normalises(model)

    @property
    def passage_fingerprint(self) -> str:
        """Digest of everything that determines the vectors of passages."""
        return self.fingerprint

    @property
    def max_seq_length(self) -> int:
        """Tokens, special tokens included, beyond which a text is truncated."""
        return int(self.model.max_seq_length or 0)

    def encode(self, texts: Sequence[str], task: Task, **limits: Any) -> Vectors:
        """Vectors of checked texts, float32 [texts, dimension]; `limits` are those of `encode.encode`."""
        with self.lock:
            return encode(self.model, texts, task, unit_length=self._unit_length, fused=self.fused, **limits)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each passage, prompt and special tokens included, without truncation."""
        with self.lock:
            return count_tokens(self.model, texts, self._passage_prompt())

    def _passage_prompt(self) -> str:
        return str(self.model.prompts.get("document") or "")

    def own_model(self, *, to_change: bool = False) -> SentenceTransformer:
        """The loaded model.

        Args:
            to_change: Whether the caller may change its weights.

        Raises:
            ConfigError: The model is shared with others, or exported.
        """
        if to_change:
            self.fused = False  # oneDNN's products use packed copies of the weights
        model: SentenceTransformer = self.model
        return model


def load_backend(settings: LoraEmbedding) -> EmbeddingBackend:
    """Load what the settings name: adapters on a shared base model, an export, or a model of its own."""
    if settings.adapters is not None:
        return PooledBackend(settings)
    if settings.adapter_path is not None and (Path(settings.adapter_path) / EXPORT_NAME).exists():
        facts = Export.read(Path(settings.adapter_path))
        return MergedExportBackend(settings, facts) if facts.backend == "merged" else ExportedBackend(settings, facts)
    if settings.adapter_path is not None and (adapter := _open(settings)).tune() == "query":
        return QuerySideBackend(settings, adapter)
    return MergedBackend(settings)


class MergedBackend(EmbeddingBackend):
    """A model of its own: a base model with an adapter, merged or not, or a base model alone."""

    def __init__(self, settings: LoraEmbedding, adapter: OpenedAdapter | None = None) -> None:
        if settings.adapter_path is None:
            assert settings.base_model is not None
            base = describe_base(settings.base_model, settings.revision, settings.cache_folder)
            model = load_base(base, **_fields(settings, *_BASE_ARGUMENTS, *_PROMPTS))
            super().__init__(model, settings.truncate_dim)
            self.fingerprint = fingerprint(model, base.weights_sha256, None)
        else:
            adapter = adapter or _open(settings)
            arguments = _fields(settings, *_BASE_ARGUMENTS, *_PROMPTS, "merge")
            model, self.fingerprint = load_adapter(adapter, scale=settings.adapter_scale, **arguments)
            super().__init__(model, settings.truncate_dim)
            self.manifest = adapter.manifest


class QuerySideBackend(MergedBackend):
    """An adapter for queries alone, and its base for passages, which is loaded when the first passage is embedded."""

    def __init__(self, settings: LoraEmbedding, adapter: OpenedAdapter) -> None:
        super().__init__(settings, adapter)
        self._passage_fingerprint = fingerprint(self.model, adapter.base.weights_sha256, None)
        self._base, self._loading = adapter.base, _fields(settings, "device", "trust_remote_code", "truncate_dim")
        self._passages: EmbeddingBackend | None = None

    @property
    def passage_fingerprint(self) -> str:
        """That of `LoraEmbedding` with the base alone."""
        return self._passage_fingerprint

    def encode(self, texts: Sequence[str], task: Task, **limits: Any) -> Vectors:
        """Vectors of queries with the adapter, of passages without it."""
        if task == "query":
            return super().encode(texts, task, **limits)
        with self.lock:
            if self._passages is None:
                self._passages = self._load_passages()
            return self._passages.encode(texts, task, **limits)

    def _load_passages(self) -> EmbeddingBackend:
        prompts = {f"{side}_prompt": self.model.prompts.get(task) for side, task in _SIDES.items()}
        model = load_base(self._base, pooling=pooling_of(self.model), **prompts, **self._loading)
        model.max_seq_length = self.model.max_seq_length
        if fingerprint(model, self._base.weights_sha256, None) != self._passage_fingerprint:
            raise AdapterError(
                f"the base {self._base.model_id!r}, whose modules or tokenizer are not those of the adapter",
                "the base that the adapter was trained on, whose vectors of passages the index holds",
                "Pass that base as base_model=.",
            )
        return EmbeddingBackend(model, self._loading["truncate_dim"])


class ExportedBackend(EmbeddingBackend):
    """A model that was exported to ONNX Runtime or OpenVINO."""

    def __init__(self, settings: LoraEmbedding, facts: Export) -> None:
        assert settings.adapter_path is not None
        _refuse_fixed(settings, ["device"] if settings.device not in (None, "cpu") else [])
        super().__init__(ExportedModel(Path(settings.adapter_path), facts))
        self.fingerprint = facts.fingerprint

    def own_model(self, *, to_change: bool = False) -> SentenceTransformer:
        """Raises a ConfigError."""
        raise ConfigError(
            "a model that was exported",
            "a model of torch",
            f"Load the model that it was exported from, {self.model.facts.name!r}.",
        )


class MergedExportBackend(EmbeddingBackend):
    """A full model that was exported, which torch computes."""

    def __init__(self, settings: LoraEmbedding, facts: Export) -> None:
        assert settings.adapter_path is not None
        _refuse_fixed(settings)
        arguments = _fields(settings, "device", "trust_remote_code")
        super().__init__(load_base(describe_base(settings.adapter_path), **arguments))
        self.fingerprint = facts.fingerprint


def _refuse_fixed(settings: LoraEmbedding, more: Sequence[str] = ()) -> None:
    """Raise a ConfigError where the settings name something that is fixed in an export."""
    fixed = ("base_model", *_PROMPTS, "pooling", "window", "truncate_dim", "adapter_scale", "merge")
    defaults = type(settings).model_fields
    given = [name for name, value in _fields(settings, *fixed).items() if value != defaults[name].default]
    if given := [*given, *more]:
        raise ConfigError(
            f"{', '.join(given)} for a model that was exported",
            "none of these, which are fixed in an export",
            "Export a model that was loaded with them.",
        )


class PooledBackend(EmbeddingBackend):
    """One of several adapters, or the base model alone, on a base model that all such backends of the process share."""

    def __init__(self, settings: LoraEmbedding) -> None:
        paths = dict(settings.adapters or {})
        opened: dict[str, OpenedAdapter] = {}
        if settings.base_model is None:
            name, path = next(iter(paths.items()))
            opened[name] = open_adapter(path, cache_folder=settings.cache_folder)
            base = opened[name].base
        else:
            base = describe_base(settings.base_model, settings.revision, settings.cache_folder)
        self.pool = AdapterPool.of(base, max_adapters=settings.max_adapters, **_fields(settings, *_BASE_ARGUMENTS))
        super().__init__(self.pool.model, settings.truncate_dim)
        self.lock = self.pool.lock
        self._cache_folder, self._scale = settings.cache_folder, settings.adapter_scale
        prompts = {"query": settings.query_prompt, "document": settings.passage_prompt}
        self._prompts = {task: prompt for task, prompt in prompts.items() if prompt is not None}
        self.adapters: dict[str, PooledAdapter] = {}
        for name, path in paths.items():
            self.add(name, opened.get(name) or path)
        self._select(settings.adapter)

    def _select(self, name: str | None) -> None:
        self.selected = None if name is None else self._named(name)
        if self.selected is not None:
            self.fingerprint, self.manifest = self.selected.fingerprint, self.selected.manifest
        else:
            self.manifest = None
            self.fingerprint = self.pool.fingerprint_of(self._base_prompts(), self.pool.max_seq_length)

    @property
    def passage_fingerprint(self) -> str:
        """That of the base alone where the selected adapter is for queries."""
        selected = self.selected
        if selected is None or not selected.query_only:
            return self.fingerprint
        return self.pool.fingerprint_of(selected.prompts, selected.max_seq_length)

    def with_adapter(self, name: str | None) -> PooledBackend:
        """The same pool with another adapter, or the base model alone."""
        view = copy.copy(self)
        view._select(name)
        return view

    def _named(self, name: Any) -> PooledAdapter:
        adapter = self.adapters.get(name)
        if adapter is None:
            raise ConfigError(
                f"an adapter named {name!r}", f"one of {_listed(self.adapters)}", "add_adapter(name, path) adds one."
            )
        return adapter

    def add(self, name: str, adapter: str | OpenedAdapter) -> None:
        """Register an adapter under a free name; see `LoraEmbedding.add_adapter`."""
        if name in self.adapters:
            raise ConfigError(
                f"a second adapter named {name!r}",
                f"a name other than {_listed(self.adapters)}",
                f"Call remove_adapter({name!r}) first.",
            )
        if isinstance(adapter, str):
            adapter = open_adapter(adapter, base_model=self.pool.base, cache_folder=self._cache_folder)
        registered = self.pool.register(adapter, prompts=self._prompts, scale=self._scale)
        self.adapters = {**self.adapters, name: registered}  # a new dict: copies keep theirs

    def remove(self, name: str) -> None:
        """Forget an adapter, and unload it if no other name stands for it; see `LoraEmbedding.remove_adapter`."""
        removed = self._named(name)
        if removed is self.selected:
            raise ConfigError(
                f"adapter {name!r}, which this embedding model uses",
                "an adapter that is not in use",
                "Remove it from the object on which with_adapter() was called.",
            )
        self.adapters = {other: adapter for other, adapter in self.adapters.items() if other != name}
        if removed not in self.adapters.values():
            self.pool.unload(removed.name)

    @property
    def max_seq_length(self) -> int:
        """Tokens beyond which a text is truncated."""
        return self.pool.max_seq_length if self.selected is None else self.selected.max_seq_length

    def encode(
        self, texts: Sequence[str], task: Task, *, names: Sequence[str | None] | None = None, **limits: Any
    ) -> Vectors:
        """Vectors with the selected adapter, or with the adapter that `names` has for each text (None: base model)."""
        if names is None:
            adapters = [self.selected] * len(texts)
        else:
            adapters = [None if name is None else self._named(name) for name in names]
        limits["unit_length"] = self._unit_length
        return self.pool.encode(texts, adapters, task, base_prompts=self._base_prompts(), **limits)

    def _base_prompts(self) -> dict[str, str]:
        return {**self.pool.prompts, **self._prompts}

    def _passage_prompt(self) -> str:
        return (self._base_prompts() if self.selected is None else self.selected.prompts)["document"]

    def own_model(self, *, to_change: bool = False) -> SentenceTransformer:
        """Raises a ConfigError."""
        raise ConfigError(
            "an embedding model with adapters, which shares its model with others in the process",
            "one with its own model; shared models are read-only",
            "LoraEmbedding(path, merge=False).sentence_transformer",
        )


def _open(settings: LoraEmbedding) -> OpenedAdapter:
    assert settings.adapter_path is not None
    return open_adapter(settings.adapter_path, **_fields(settings, "base_model", "revision", "cache_folder"))


def _fields(settings: LoraEmbedding, *names: str) -> dict[str, Any]:
    """Some fields as keyword arguments."""
    return {name: getattr(settings, name) for name in names}


def _listed(names: dict[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "none"
