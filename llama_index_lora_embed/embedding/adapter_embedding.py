"""`AdapterEmbeddingModel`: any LlamaIndex embedding model with a small map on top of its query vectors."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, SerializeAsAny
from llama_index.core.callbacks import CallbackManager

from llama_index_lora_embed.core.arrays import cosine
from llama_index_lora_embed.core.errors import AdapterError, BaseModelMismatchError, ConfigError
from llama_index_lora_embed.core.files import absolute
from llama_index_lora_embed.embedding.cache import ModelEmbeddingsCache, OneSpan, cache_keys
from llama_index_lora_embed.embedding.identity import fingerprint_with, passage_fingerprint, query_fingerprint
from llama_index_lora_embed.models.tokens import check_text, check_texts

if TYPE_CHECKING:
    from typing_extensions import Self

    from llama_index_lora_embed.models.adapter_directory import Manifest
    from llama_index_lora_embed.models.embedding_adapter_directory import FloatArray
    from llama_index_lora_embed.models.stored_adapter import StoredAdapter

PROBE = "Which of these words tells one embedding model from another?"
"""A query whose vector is recorded with an adapter, to recognise the embedding model that it was trained on."""

_SAME_MODEL = 0.999  # cosine of two vectors of the probe by one model; backends and APIs are not exact


class AdapterEmbeddingModel(OneSpan, BaseEmbedding):
    """An embedding model whose query vectors go through an adapter; passages keep the vectors of the model itself.

    It takes the arguments of llama-index-embeddings-adapter's class of this name, and its directories. An index of
    `base_embed_model` stays as it is.

    With the directory of `align_index` it is a bridge from `base_embed_model` to the index of another model: passages
    are mapped, too, so that new nodes can be added to that index.

    Args:
        base_embed_model: Any LlamaIndex embedding model: the one that the adapter was trained on.
        adapter_path: Directory of `EmbeddingAdapterFinetuneEngine`, of `align_index`, or of
            llama-index-embeddings-adapter.
        adapter_cls: Class of the adapter; None for the one that is recorded (a `LinearLayer` if none is).
        transform_query: False leaves queries as they are, too.
        device: torch device for adapters that are not linear; None for the processor. Linear ones take numpy.
        embed_batch_size: Texts that LlamaIndex passes at once; None for that of `base_embed_model`.
        callback_manager: LlamaIndex's.

    Attributes:
        fingerprint: Digest of everything that determines the vectors of queries; in `to_dict()`.

    Raises:
        ConfigError: base_embed_model is not an embedding model; or transform_query is False for a bridge.
        ModelNotFoundError: There is no such directory.
        AdapterError: It is damaged, of another class, of other dimensions, or it has changed since this object was
            serialised.
        BaseModelMismatchError: The adapter was trained on another embedding model: the recorded one is not this one,
            and the vectors of a query differ.
        UnsafeCheckpointError: The adapter is a pickle of more than tensors.

    All methods raise a ConfigError for an input that is not a string.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    base_embed_model: SerializeAsAny[BaseEmbedding]
    """The embedding model below the adapter."""
    adapter_path: str
    """Directory of the adapter."""
    adapter_cls: Any = Field(default=None, exclude=True)
    """Class of the adapter; None for the one that is recorded."""
    transform_query: bool = True
    """Whether queries go through the adapter."""
    device: str | None = None
    """torch device for adapters that are not linear."""
    fingerprint: str | None = None
    """Digest of everything that determines the vectors of queries."""

    _stored: StoredAdapter | None = PrivateAttr(default=None)
    _function: Callable[[Any], FloatArray] | None = PrivateAttr(default=None)

    def __init__(
        self,
        base_embed_model: BaseEmbedding | Mapping[str, Any],
        adapter_path: str | os.PathLike[str],
        adapter_cls: type[Any] | None = None,
        transform_query: bool = True,
        device: str | None = None,
        embed_batch_size: int | None = None,
        callback_manager: CallbackManager | None = None,
        **kwargs: Any,
    ) -> None:
        base = _embedding_model(base_embed_model)
        kwargs.setdefault("model_name", f"Adapter for {base.model_name}")
        if callback_manager is not None:
            kwargs["callback_manager"] = callback_manager
        kwargs |= {"base_embed_model": base, "adapter_path": absolute(adapter_path), "adapter_cls": adapter_cls}
        kwargs |= {"transform_query": transform_query, "device": device}
        kwargs["embeddings_cache"] = ModelEmbeddingsCache.of(kwargs.get("embeddings_cache"))
        super().__init__(embed_batch_size=embed_batch_size or base.embed_batch_size, **kwargs)
        self._load()

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return "AdapterEmbeddingModel"

    @property
    def manifest(self) -> Manifest | None:
        """How the adapter was made; None for one of llama-index-embeddings-adapter."""
        return self._adapter().manifest

    @property
    def passage_fingerprint(self) -> str:
        """Digest of what determines the vectors of passages in the index that this searches.

        It is that of `base_embed_model`; for a bridge, that of the model that built the index.
        """
        index = self._index()
        return passage_fingerprint(self.base_embed_model) if index is None else str(index["fingerprint"])

    @property
    def is_bridge(self) -> bool:
        """Whether it searches the index of another model than `base_embed_model`, and maps passages as well."""
        return self._index() is not None

    def _index(self) -> dict[str, Any] | None:
        """The stamp of another model's index, and its dimensions."""
        manifest = self.manifest
        return None if manifest is None else manifest.embedding_adapter.get("index")

    def transform(self, vectors: Any) -> FloatArray:
        """The vectors of queries, [queries, dimensions], that belong to these vectors of `base_embed_model`.

        For a bridge, those of passages, too.

        Raises:
            AdapterError: The adapter has other dimensions.
        """
        import numpy as np

        given = np.asarray(vectors, np.float32)
        if not self.transform_query:
            return given
        if self._function is None:
            stored = self._adapter()
            if not stored.is_identity:
                from llama_index_lora_embed.models.embedding_adapter import check_shape

                index = self._index()
                returned = None if index is None else int(index["dimensions"])
                check_shape(stored.adapter, given.shape[-1], f"an adapter in {self.adapter_path!r}", returned)
            self._function = stored.function(self.device or "cpu")
        return self._function(given)

    def _adapter(self) -> StoredAdapter:
        return self._stored or self._load()

    def _load(self) -> StoredAdapter:
        from llama_index_lora_embed.models.stored_adapter import read_adapter

        stored = read_adapter(self.adapter_path, self.adapter_cls)
        if not self.transform_query and stored.manifest is not None and "index" in stored.manifest.embedding_adapter:
            raise ConfigError(
                f"transform_query=False for the bridge in {self.adapter_path!r}",
                "True, because the index has the vectors of another model",
                "Pass base_embed_model itself to query an index of its own.",
            )
        fingerprint = fingerprint_with(self.base_embed_model, stored.digest() if self.transform_query else "")
        if self.fingerprint is None:
            self._check_base(stored)
        elif self.fingerprint != fingerprint:
            raise AdapterError(
                f"{self.adapter_path!r} with the fingerprint {fingerprint[:12]}...",
                f"{self.fingerprint[:12]}..., which was recorded when this object was saved",
                "AdapterEmbeddingModel(base_embed_model, adapter_path) loads the current adapter.",
            )
        self.fingerprint, self._stored = fingerprint, stored
        return stored

    def _check_base(self, stored: StoredAdapter) -> None:
        """Compare the embedding model with the recorded one, by a query's vector where class or settings differ."""
        import numpy as np

        trained_on = {} if stored.manifest is None else stored.manifest.embedding_adapter.get("embed_model", {})
        if stored.probe is None or trained_on.get("fingerprint") == query_fingerprint(self.base_embed_model):
            return
        vector = np.asarray(self.base_embed_model.get_query_embedding(PROBE), np.float32)
        similarity = cosine(vector, stored.probe)
        if similarity < _SAME_MODEL:
            raise BaseModelMismatchError(
                f"{type(self.base_embed_model).__name__} {self.base_embed_model.model_name!r}, whose vector of a query "
                f"has {len(vector)} dimensions and the cosine {similarity:.3f} to the one that was recorded",
                f"the embedding model that the adapter was trained on: {trained_on.get('class')} "
                f"{trained_on.get('model_name')!r} with {len(stored.probe)} dimensions",
                "Pass that one, or train an adapter on this one.",
            )

    def __getstate__(self) -> dict[str, Any]:
        """Fields only; the adapter is read again at the first use."""
        names = (name for name in type(self).model_fields if name not in ("callback_manager", "rate_limiter"))
        return {"fields": {name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        blank = type(self).model_construct(**state["fields"])
        for slot in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"):
            object.__setattr__(self, slot, getattr(blank, slot))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with a copy of the embedding model; the adapter is read again at the first use."""
        fields = self.__getstate__()["fields"]
        made = type(self).__new__(type(self))
        made.__setstate__({"fields": {**fields, "base_embed_model": copy.deepcopy(self.base_embed_model, memo)}})
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, ModelEmbeddingsCache.of(value) if name == "embeddings_cache" else value)

    def _cache_keys(self, side: str) -> AbstractContextManager[None]:
        """Keys of LlamaIndex's cache, which are the text alone otherwise, the same for queries and passages."""
        if self.embeddings_cache is None:
            return nullcontext()
        # a bridge has the passage_fingerprint of the old model, and other vectors of passages
        own = side == "query" or self.is_bridge
        return cache_keys(self.fingerprint if own else self.passage_fingerprint, side)

    def get_query_embedding(self, query: str) -> Embedding:
        """The vector of a query."""
        with self._cache_keys("query"):
            return super().get_query_embedding(check_text(query))

    async def aget_query_embedding(self, query: str) -> Embedding:
        """The vector of a query."""
        with self._cache_keys("query"):
            return await super().aget_query_embedding(check_text(query))

    def get_text_embedding(self, text: str) -> Embedding:
        """The vector of a passage."""
        with self._cache_keys("document"):
            return super().get_text_embedding(check_text(text))

    async def aget_text_embedding(self, text: str) -> Embedding:
        """The vector of a passage."""
        with self._cache_keys("document"):
            return await super().aget_text_embedding(check_text(text))

    def get_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **kwargs: Any) -> list[Embedding]:
        """Vectors of passages."""
        with self._cache_keys("document"):
            return super().get_text_embedding_batch(check_texts(texts), show_progress, **kwargs)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """Vectors of passages."""
        with self._cache_keys("document"):
            return await super().aget_text_embedding_batch(check_texts(texts), show_progress, **kwargs)

    # The private methods of the model below count no text twice with its callbacks; its cache and its rate limiter
    # are only heard by the public ones.
    @property
    def _is_plain(self) -> bool:
        base = self.base_embed_model
        return base.embeddings_cache is None and base.rate_limiter is None

    def _mapped(self, vector: Embedding) -> Embedding:
        return self.transform(vector).tolist() if self.transform_query else vector

    def _passages(self, vectors: list[Embedding]) -> list[Embedding]:
        return self.transform(vectors).tolist() if self.is_bridge else vectors

    def _get_query_embedding(self, query: str) -> Embedding:
        base = self.base_embed_model
        return self._mapped(base._get_query_embedding(query) if self._is_plain else base.get_query_embedding(query))

    async def _aget_query_embedding(self, query: str) -> Embedding:
        base = self.base_embed_model
        embed = base._aget_query_embedding if self._is_plain else base.aget_query_embedding
        return self._mapped(await embed(query))

    def _get_text_embedding(self, text: str) -> Embedding:
        base = self.base_embed_model
        return self._passages([base._get_text_embedding(text) if self._is_plain else base.get_text_embedding(text)])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        base = self.base_embed_model
        embed = base._aget_text_embedding if self._is_plain else base.aget_text_embedding
        return self._passages([await embed(text)])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        base = self.base_embed_model
        embed = base._get_text_embeddings if self._is_plain else base.get_text_embedding_batch
        return self._passages(embed(texts))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        base = self.base_embed_model
        embed = base._aget_text_embeddings if self._is_plain else base.aget_text_embedding_batch
        return self._passages(await embed(texts))


LinearAdapterEmbeddingModel = AdapterEmbeddingModel
"""llama-index-embeddings-adapter's older name."""


def adapter_manifest(
    embed_model: BaseEmbedding, dimensions: int, *, index: dict[str, Any] | None = None, **origin: Any
) -> Manifest:
    """The manifest of an adapter on top of an embedding model, still without its fingerprint.

    Args:
        embed_model: The model below.
        dimensions: Of its vectors.
        index: For a bridge, what identifies the index of the other model.
        **origin: Fields that say how the adapter was made: dataset, settings, metrics, verdict, ...
    """
    from llama_index_lora_embed.models.adapter_directory import Manifest, written_now

    recorded = {
        "class": type(embed_model).__name__,
        "model_name": embed_model.model_name,
        "fingerprint": query_fingerprint(embed_model),
    }
    return Manifest(
        fingerprint="",
        base={"model_id": embed_model.model_name, "revision": None},
        prompts={},
        pooling=[],
        max_seq_length=0,
        normalise=True,
        similarity="cosine",
        tune="query",
        embedding_adapter={
            "dimensions": dimensions,
            "embed_model": recorded,
            **({} if index is None else {"index": index}),
        },
        **origin,
        **written_now(),
    )


def _embedding_model(given: Any) -> BaseEmbedding:
    """An embedding model, or one from the mapping that `to_dict()` made of it."""
    from llama_index.core.embeddings.loading import load_embed_model

    from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

    if isinstance(given, Mapping):
        if given.get("class_name") == LoraEmbedding.class_name():
            return LoraEmbedding.from_dict(dict(given))
        try:
            return load_embed_model(dict(given))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"base_embed_model as a mapping of the class {given.get('class_name')!r} ({error})",
                "an embedding model, or the to_dict() of one that LlamaIndex can load",
                "AdapterEmbeddingModel.from_dict(data, base_embed_model=embed_model)",
            ) from error
    if isinstance(given, BaseEmbedding):
        return given
    raise ConfigError(
        f"base_embed_model of type {type(given).__name__}",
        "a LlamaIndex BaseEmbedding",
        'resolve_embed_model("local:...") makes one from a string.',
    )
