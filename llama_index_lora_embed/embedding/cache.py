"""LlamaIndex's `embeddings_cache` with keys that contain the model and the task, and the methods that consult it.

LlamaIndex's own key is the text alone, so that queries and passages, and all models with one store, share an entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.storage.kvstore.types import DEFAULT_COLLECTION, BaseKVStore

_PREFIX: ContextVar[str] = ContextVar("embeddings_cache_prefix", default="")


@contextmanager
def cache_keys(fingerprint: str | None, task: str) -> Iterator[None]:
    """Within it, also in the tasks and threads that it starts, the cache's keys are those of this model and task.

    Args:
        fingerprint: The model's `LoraEmbedding.fingerprint`.
        task: "query" or "document".
    """
    token = _PREFIX.set(f"{fingerprint}:{task}:")
    try:
        yield
    finally:
        _PREFIX.reset(token)


class ModelEmbeddingsCache(BaseKVStore):
    """A key-value store whose keys begin with a model and a task within `cache_keys`; elsewhere it is the store itself.

    Args:
        store: Any store of LlamaIndex; any number of models may share it.
    """

    def __init__(self, store: BaseKVStore) -> None:
        self.store = store

    @classmethod
    def of(cls, store: Any) -> Any:
        """The cache on a store; anything else is returned unchanged, for LlamaIndex to check."""
        return cls(store) if isinstance(store, BaseKVStore) and not isinstance(store, cls) else store

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Store a value."""
        self.store.put(_PREFIX.get() + key, val, collection)

    async def aput(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Store a value."""
        await self.store.aput(_PREFIX.get() + key, val, collection)

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """A value, or None."""
        return self.store.get(_PREFIX.get() + key, collection)

    async def aget(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """A value, or None."""
        return await self.store.aget(_PREFIX.get() + key, collection)

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """All values by their complete keys."""
        return self.store.get_all(collection)

    async def aget_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """All values by their complete keys."""
        return await self.store.aget_all(collection)

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Delete a value; False if there was none."""
        return self.store.delete(_PREFIX.get() + key, collection)

    async def adelete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Delete a value; False if there was none."""
        return await self.store.adelete(_PREFIX.get() + key, collection)


class OneSpan:
    """For a class that overrides LlamaIndex's public methods to set the keys: `super()` calls them without their span.

    LlamaIndex gives each override a span of its own, so that a call would be two in a trace, and take 30 µs longer.
    """


for _name in ("get_query_embedding", "get_text_embedding", "get_text_embedding_batch"):
    for _method in (_name, f"a{_name}"):
        setattr(OneSpan, _method, inspect.unwrap(getattr(BaseEmbedding, _method)))
