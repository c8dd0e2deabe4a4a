"""`LoraEmbedding`: a base model with an adapter as a LlamaIndex embedding model."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr

from llama_index_lora_embed.core.errors import AdapterError, ConfigError
from llama_index_lora_embed.core.files import absolute
from llama_index_lora_embed.embedding.cache import ModelEmbeddingsCache, OneSpan, cache_keys
from llama_index_lora_embed.models.tokens import check_text, check_texts, longest_first

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from typing_extensions import Self

    from llama_index_lora_embed.embedding.backends import EmbeddingBackend, PooledBackend
    from llama_index_lora_embed.embedding.encode import Task
    from llama_index_lora_embed.embedding.export import Certificate
    from llama_index_lora_embed.models.adapter_directory import Manifest


class LoraEmbedding(OneSpan, BaseEmbedding):
    """A LlamaIndex embedding model from an adapter directory, written by this package, sentence-transformers or peft.

    Its vectors are those of `SentenceTransformer(adapter_path)`: queries with the query prompt, passages with the
    document prompt, truncated at the recorded `max_seq_length`. An adapter of peft alone, without `modules.json`,
    records none of these, and takes them and the pooling of its base, where `SentenceTransformer` would take the mean.
    The LoRA is merged into the base model in float32, so
    that inference takes no longer than with the base model. The texts of a call are sorted by length and computed in
    batches of a limited number of tokens, which keeps padding low.

    With `adapters` it holds several adapters on one base model in memory, which it shares with all such objects of the
    process. `with_adapter(name)` is an embedding model with one of them, at no cost; `get_mixed_embeddings` embeds
    texts that each name an adapter.

    It consists of plain values and can be serialised (`to_dict`, `from_dict`), pickled, and used in the worker
    processes of an `IngestionPipeline`. Its dict contains the `fingerprint`, which changes whenever its vectors would,
    so that LlamaIndex's ingestion cache treats a retrained model as a new one.

    Raises:
        ConfigError: Neither an adapter nor a base model is given, `truncate_dim` exceeds the model's dimensions,
            `pooling` is unknown, `pooling` or `window` is not the adapter's, nothing says with which pooling an adapter
            of peft was trained, or `adapter` is not among `adapters`. All methods raise it, too, for an input that is
            not a string.
        ModelNotFoundError: The adapter or its base model does not exist.
        AdapterError: The adapter is damaged or does not fit its base model, or it has changed since the object was
            serialised.
        BaseModelMismatchError: The adapter was trained on another base model.

    Example:
        >>> embed_model = LoraEmbedding("runs/handbook")  # doctest: +SKIP
        >>> index = VectorStoreIndex(nodes, embed_model=embed_model)  # doctest: +SKIP
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    adapter_path: str | None = None
    """Folder or Hub id of the adapter, or folder of an export; None for the base model alone."""
    base_model: str | None = None
    """Folder or Hub id of the base model, if the adapter records another place or there is no adapter."""
    adapters: dict[str, str] | None = None
    """Name to folder or Hub id of adapters that were trained on one base model, instead of `adapter_path`. They are not
    merged. Without `base_model`, the base model is the one that the first adapter names."""
    adapter: str | None = Field(default=None, frozen=True)
    """Name of the adapter in `adapters` that is used; None for the base model alone."""
    adapter_scale: float = Field(default=1.0, ge=0.0, le=1.0, frozen=True)
    """Factor of the LoRA, from 0 (the base model's vectors) to 1. In between, less has been learnt and less forgotten;
    `tune_scale` finds the best value on validation data."""
    max_adapters: int = Field(default=32, ge=1, frozen=True)
    """Number of adapters in memory; the least recently used is unloaded, and loaded again when it is used. Among
    objects that share a base model, the largest number counts."""
    revision: str | None = None
    """Commit on the Hub of the adapter, or of `base_model` if there is no adapter or there are several."""
    cache_folder: str | None = None
    """Cache folder of huggingface_hub."""
    device: str | None = None
    """torch device; None lets sentence-transformers choose."""
    query_prompt: str | None = None
    """Overrides the recorded query prompt."""
    passage_prompt: str | None = None
    """Overrides the recorded passage prompt."""
    pooling: str | None = None
    """Overrides the pooling of a base model alone (one of `config.POOLING_MODES`), or of an adapter of peft whose files
    name none. All other adapters keep the pooling that they were trained with."""
    window: int | None = None
    """Splits long texts into windows of this many tokens (`windows.add_windows`), where `pooling` can be given."""
    truncate_dim: int | None = None
    """Truncates vectors to their first dimensions, and scales them to length 1 again if the model does; for models that
    were trained with Matryoshka losses."""
    merge: bool = True
    """Merge the LoRA into the base model's weights."""
    trust_remote_code: bool = False
    """Run Python code from the base model's repository."""
    embed_batch_size: int = Field(default=256, gt=0, le=2048)
    """Texts that LlamaIndex passes at once, and at most in a forward pass."""
    tokens_per_pass: int | None = Field(default=None, ge=1)
    """Tokens in a forward pass, padding included; None for 2,048 on CPUs and 65,536 on accelerators. Lower it if a
    device runs out of memory."""
    fingerprint: str | None = None
    """Digest of everything that determines the vectors."""

    _backend: EmbeddingBackend | None = PrivateAttr(default=None)
    _lock: Any = PrivateAttr(default_factory=threading.RLock)

    def __init__(
        self,
        adapter_path: str | os.PathLike[str] | None = None,
        *,
        base_model: str | os.PathLike[str] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        if not (adapter_path or base_model or adapters):
            raise ConfigError(
                "LoraEmbedding() without a model",
                "adapter_path, base_model or both, or adapters",
                'LoraEmbedding("runs/handbook")',
            )
        path, base = (None if place is None else absolute(place) for place in (adapter_path, base_model))
        selected = kwargs.get("adapter")
        if adapters is None and selected is not None:
            adapters = {}  # the backend reports the unknown name
        named = None if adapters is None else _check_adapters(adapters)
        if path is not None and named is not None:
            raise ConfigError(
                f"adapter_path={path!r} together with adapters",
                "one adapter, or several by name",
                f"LoraEmbedding(adapters={{'a name': {path!r}, ...}})",
            )
        places = [path, (named or {}).get(selected or ""), base, *(named or {}).values()]
        kwargs.setdefault("model_name", next(place for place in places if place))
        if kwargs.get("cache_folder") is not None:  # pickled objects are used in other working directories
            kwargs["cache_folder"] = os.path.abspath(os.path.expanduser(kwargs["cache_folder"]))
        kwargs |= {"adapter_path": path, "base_model": base, "adapters": named}
        super().__init__(**kwargs)
        self.embeddings_cache = self.embeddings_cache  # wrapped by `__setattr__`
        self._load()

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return "LoraEmbedding"

    @property
    def backend(self) -> EmbeddingBackend:
        """The loaded model; it is loaded now if this object came from a pickle."""
        with self._lock:
            return self._backend or self._load()

    def _load(self) -> EmbeddingBackend:
        from llama_index_lora_embed.embedding.backends import load_backend

        backend = load_backend(self)
        if self.fingerprint is not None and self.fingerprint != backend.fingerprint:
            raise AdapterError(
                f"{self.model_name!r} with the fingerprint {backend.fingerprint[:12]}...",
                f"{self.fingerprint[:12]}..., which was recorded when this object was saved; the model was retrained "
                "since, and its vectors do not fit the earlier ones",
                f"LoraEmbedding({self.model_name!r}) loads the current model; rebuild the index with it.",
            )
        self.fingerprint, self._backend = backend.fingerprint, backend
        return backend

    @property
    def manifest(self) -> Manifest | None:
        """How the adapter was made; None for a base model alone and for adapters of sentence-transformers."""
        return self.backend.manifest

    @property
    def passage_fingerprint(self) -> str:
        """Digest of everything that determines the vectors of passages.

        For an adapter that was trained with `tune="query"` it is the fingerprint of its base, whose index it searches;
        for any other model it is `fingerprint`.
        """
        return self.backend.passage_fingerprint

    @property
    def max_seq_length(self) -> int:
        """Tokens, special tokens included, beyond which a text is truncated."""
        return self.backend.max_seq_length

    @property
    def sentence_transformer(self) -> SentenceTransformer:
        """The loaded model; with `merge=False`, sentence-transformers' methods for adapters work on it.

        Raises:
            ConfigError: The model is shared with others, or exported.
        """
        return self.backend.own_model(to_change=True)

    def export(self, path: str | os.PathLike[str], **settings: Any) -> Certificate:
        """Write this model for another server or backend; arguments, result and errors are those of `export_model`.

        Example:
            >>> embed_model.export("runs/handbook-int8", texts=texts, precision="int8")  # doctest: +SKIP
        """
        from llama_index_lora_embed.embedding.export import export_model

        return export_model(self, path, **settings)

    def list_adapters(self) -> list[str]:
        """Names of the adapters that texts can name; empty for an object without `adapters`."""
        return list(self.adapters or {})

    def add_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Add an adapter; its weights are loaded when a text first names it.

        Raises:
            ConfigError: The name is taken, this object was made without `adapters`, or the adapter is not plain LoRA.
            ModelNotFoundError: The adapter does not exist.
            AdapterError: The adapter is damaged.
            BaseModelMismatchError: The adapter was trained on another base model.
        """
        with self._lock:
            backend, found = self._pool(), _check_adapters({name: path})
            backend.add(name, found[name])
            self.adapters = {**(self.adapters or {}), **found}

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory after the calls that use it.

        Raises:
            ConfigError: The name is unknown, or this embedding model uses the adapter.
        """
        with self._lock:
            self._pool().remove(name)
            self.adapters = {other: path for other, path in (self.adapters or {}).items() if other != name}

    def with_adapter(self, name: str | None) -> Self:
        """An embedding model with one of the adapters, or the base model alone (None), that shares the base model.

        Adapters that are added or removed afterwards affect only the object on which that was called.

        Raises:
            ConfigError: The name is unknown.
        """
        with self._lock:
            backend = self._pool().with_adapter(name)
            view = self.__deepcopy__()
            view.__dict__["adapter"] = name
            view.model_name = backend.pool.base.model_id if name is None else (self.adapters or {})[name]
            view.fingerprint, view._backend = backend.fingerprint, backend
            # not copied by __deepcopy__
            view.callback_manager, view.rate_limiter = self.callback_manager, self.rate_limiter
        return view

    def get_mixed_embeddings(
        self, texts: Sequence[str], adapters: Sequence[str | None], *, kind: Literal["text", "query"] = "text"
    ) -> list[Embedding]:
        """Vectors of texts, each with the adapter that it names, computed together.

        Args:
            texts: Any number.
            adapters: For each text the name of an adapter, or None for the base model.
            kind: Whether the texts are passages ("text") or queries, which determines the prompt.

        Raises:
            ConfigError: A name is unknown, or the numbers of names and texts differ.
        """
        self._pool()  # only a pool has names
        checked = check_texts(texts)
        listed = isinstance(adapters, Sequence) and not isinstance(adapters, str)
        if not listed or len(adapters) != len(checked):
            got = f"{len(adapters)} names" if listed else repr(adapters)
            raise ConfigError(
                f"{got} for {len(checked)} texts", "a name or None for each text", "Pass as many names as texts."
            )
        if kind not in ("text", "query"):
            raise ConfigError(f"kind={kind!r}", "'text' or 'query'", "Pass kind='query' for queries.")
        return self._encode(checked, "query" if kind == "query" else "document", names=adapters)

    async def aget_mixed_embeddings(
        self, texts: Sequence[str], adapters: Sequence[str | None], *, kind: Literal["text", "query"] = "text"
    ) -> list[Embedding]:
        """`get_mixed_embeddings`, in a thread."""
        return await asyncio.to_thread(self.get_mixed_embeddings, texts, adapters, kind=kind)

    def _pool(self) -> PooledBackend:
        from llama_index_lora_embed.embedding.backends import PooledBackend

        backend = self.backend
        if not isinstance(backend, PooledBackend):
            raise ConfigError(
                "an embedding model with one adapter, merged into its base model",
                "one that was made with adapters",
                'LoraEmbedding(adapters={"legal": "runs/legal", "hr": "runs/hr"}), or adapters={} with base_model=.',
            )
        return backend

    def __getstate__(self) -> dict[str, Any]:
        """Plain values only; the weights are loaded again at the first use."""
        return {"fields": {name: getattr(self, name) for name, f in type(self).model_fields.items() if not f.exclude}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # not through __init__: a process that only passes the object on should not load the model
        blank = type(self).model_construct(**state["fields"])
        for slot in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"):
            object.__setattr__(self, slot, getattr(blank, slot))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy that loads its own model at the first use; locks and loaded weights are not copied."""
        copy = type(self).__new__(type(self))
        copy.__setstate__(self.__getstate__())
        return copy

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, ModelEmbeddingsCache.of(value) if name == "embeddings_cache" else value)

    def get_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **kwargs: Any) -> list[Embedding]:
        """Vectors of passages, in their order; the longest are computed first."""
        checked = check_texts(texts)
        order = longest_first(checked)
        with self._cache_keys("document"):
            vectors = super().get_text_embedding_batch([checked[i] for i in order], show_progress, **kwargs)
        return _in_order_of_texts(vectors, order)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """`get_text_embedding_batch`, in threads."""
        checked = check_texts(texts)
        order = longest_first(checked)
        with self._cache_keys("document"):
            vectors = await super().aget_text_embedding_batch([checked[i] for i in order], show_progress, **kwargs)
        return _in_order_of_texts(vectors, order)

    def get_text_embedding(self, text: str) -> Embedding:
        """The vector of a passage."""
        with self._cache_keys("document"):
            return super().get_text_embedding(check_text(text))

    async def aget_text_embedding(self, text: str) -> Embedding:
        """`get_text_embedding`, in a thread."""
        with self._cache_keys("document"):
            return await super().aget_text_embedding(check_text(text))

    def get_query_embedding(self, query: str) -> Embedding:
        """The vector of a query."""
        with self._cache_keys("query"):
            return super().get_query_embedding(check_text(query))

    async def aget_query_embedding(self, query: str) -> Embedding:
        """`get_query_embedding`, in a thread."""
        with self._cache_keys("query"):
            return await super().aget_query_embedding(check_text(query))

    def is_cut(self, texts: list[str]) -> list[bool]:
        """Whether passages are longer than `max_seq_length`, prompt and special tokens included, and are truncated."""
        counts, limit = self.backend.count_tokens(check_texts(texts)), self.max_seq_length
        return [count > limit for count in counts]

    def _cache_keys(self, task: str) -> AbstractContextManager[None]:
        fingerprint = self.fingerprint if self.embeddings_cache is None else self.backend.fingerprint
        return cache_keys(fingerprint, task)

    def _encode(self, texts: list[str], task: Task, **names: Any) -> list[Embedding]:
        limits = {"max_tokens": self.tokens_per_pass, "max_texts": self.embed_batch_size}
        rows: list[Embedding] = self.backend.encode(texts, task, **limits, **names).tolist()
        return rows

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._encode([query], "query")[0]

    def _get_query_embeddings(self, queries: list[str]) -> list[Embedding]:
        """Vectors of many queries, which LlamaIndex has no method for; without its cache and callbacks."""
        return self._encode(check_texts(queries), "query")

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._encode([text], "document")[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.to_thread(self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._encode(texts, "document")

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


def _in_order_of_texts(vectors: list[Embedding], order: list[int]) -> list[Embedding]:
    by_index = dict(zip(order, vectors, strict=True))
    return [by_index[i] for i in range(len(order))]


def _check_adapters(adapters: Any) -> dict[str, str]:
    """Names with absolute paths."""
    wrong = [repr(adapters)]
    if isinstance(adapters, Mapping):
        right = {n: p for n, p in adapters.items() if isinstance(n, str) and n and isinstance(p, (str, os.PathLike))}
        wrong = [f"{name!r}: {path!r}" for name, path in adapters.items() if name not in right]
    if wrong:
        raise ConfigError(
            "adapters that are not a mapping of names to paths",
            "names, each with a folder or Hub id",
            "Correct these:",
            wrong,
        )
    return {name: absolute(path) for name, path in adapters.items()}
