"""LlamaIndex's `embeddings_cache`, so that it never gives one model's or one prompt's vector for another's.

LlamaIndex looks a text up by itself alone: queries and passages share an entry, and so do all models that share a
store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.storage.kvstore.types import DEFAULT_COLLECTION, BaseKVStore

_ASKING: ContextVar[str] = ContextVar("whose_vectors", default="")


@contextmanager
def asking(fingerprint: str | None, task: str) -> Iterator[None]:
    """Within it, also in the tasks and threads that it starts, keys are those of this model and task.

    Args:
        fingerprint: Of all that decides the vectors.
        task: "query" or "document".
    """
    token = _ASKING.set(f"{fingerprint}:{task}:")
    try:
        yield
    finally:
        _ASKING.reset(token)


class ModelEmbeddingsCache(BaseKVStore):
    """A key-value store whose keys begin with who is asking; outside of `asking` it is the store itself.

    Args:
        store: Any of LlamaIndex's, shared by as many models as you like.
    """

    def __init__(self, store: BaseKVStore) -> None:
        self.store = store

    @classmethod
    def of(cls, store: Any) -> Any:
        """Of a store; None and what is no store are left to LlamaIndex's own check."""
        return cls(store) if isinstance(store, BaseKVStore) and not isinstance(store, cls) else store

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Store a value."""
        self.store.put(_ASKING.get() + key, val, collection)

    async def aput(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Store a value."""
        await self.store.aput(_ASKING.get() + key, val, collection)

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """A value, or None."""
        return self.store.get(_ASKING.get() + key, collection)

    async def aget(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """A value, or None."""
        return await self.store.aget(_ASKING.get() + key, collection)

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """Everything, by whole keys."""
        return self.store.get_all(collection)

    async def aget_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """Everything, by whole keys."""
        return await self.store.aget_all(collection)

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Forget a value; whether it was there."""
        return self.store.delete(_ASKING.get() + key, collection)

    async def adelete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Forget a value; whether it was there."""
        return await self.store.adelete(_ASKING.get() + key, collection)
