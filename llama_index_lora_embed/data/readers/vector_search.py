"""Search a vector store by its own index, with the vectors of what it finds; the store is not changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from llama_index.core.schema import BaseNode

from llama_index_lora_embed.config import STAMP_ID
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.readers.vector_stores import node_of_entry
from llama_index_lora_embed.data.stored_vectors import FloatArray

_AT_ONCE = 100  # queries or ids in a request


class StoredPassage(NamedTuple):
    """A passage of a store, with its vector as the store has it."""

    node: BaseNode
    vector: FloatArray


class StoreSearch(Protocol):
    """What a vector store answers by itself."""

    def nearest(self, queries: FloatArray, depth: int) -> Iterator[list[StoredPassage]]:
        """The passages nearest to each query [queries, dimensions], nearest first, as the store's index finds them."""
        ...

    def passages(self, ids: Sequence[str]) -> dict[str, StoredPassage]:
        """The passages with these ids, without those that the store does not have."""
        ...


def store_search(store: Any) -> StoreSearch:
    """The search of a store that keeps texts and returns vectors.

    Args:
        store: A Chroma collection, or LlamaIndex's vector store of Chroma or Qdrant (with a synchronous client), or an
            index or a `StorageContext` on one.

    Raises:
        ConfigError: It is another store. What `read_vectors` reads can be mined in memory.
    """
    vectors = getattr(store, "vector_store", store)
    vectors = getattr(vectors, "_collection", vectors)  # of a ChromaVectorStore
    module = type(vectors).__module__
    if module.startswith("chromadb."):
        return _Chroma(vectors)
    if module.startswith("llama_index.vector_stores.qdrant") and vectors.client is not None:
        return _Qdrant(vectors)
    raise ConfigError(
        f"a {type(vectors).__name__}, whose search returns no vectors",
        "a Chroma collection, or a Qdrant store with a synchronous client",
        "Read its passages into memory: read_vectors(store).corpus_for(dataset), and mine_hard_negatives.",
    )


class _Chroma:
    def __init__(self, collection: Any) -> None:
        self._collection = collection

    def nearest(self, queries: FloatArray, depth: int) -> Iterator[list[StoredPassage]]:
        for start in range(0, len(queries), _AT_ONCE):
            found = self._collection.query(
                query_embeddings=queries[start : start + _AT_ONCE],
                n_results=depth,
                include=["embeddings", "documents", "metadatas"],
            )
            columns = (found[name] for name in ("ids", "metadatas", "documents", "embeddings"))
            for of_query in zip(*columns, strict=True):
                yield [_passage(*entry) for entry in zip(*of_query, strict=True)]

    def passages(self, ids: Sequence[str]) -> dict[str, StoredPassage]:
        result = {}
        for start in range(0, len(ids), _AT_ONCE):
            found = self._collection.get(
                ids=list(ids[start : start + _AT_ONCE]), include=["embeddings", "documents", "metadatas"]
            )
            columns = (found[name] for name in ("ids", "metadatas", "documents", "embeddings"))
            result.update({entry[0]: _passage(*entry) for entry in zip(*columns, strict=True)})
        return result


def _passage(entry_id: str, metadata: Any, text: str | None, vector: Any) -> StoredPassage:
    return StoredPassage(node_of_entry(entry_id, metadata or {}, text), np.asarray(vector, dtype=np.float32))


class _Qdrant:
    def __init__(self, store: Any) -> None:
        self._client, self._name, self._text_key = store.client, store.collection_name, store.text_key
        params = self._client.get_collection(self._name).config.params.vectors
        self._vector_name = store.dense_vector_name if isinstance(params, dict) else None

    def nearest(self, queries: FloatArray, depth: int) -> Iterator[list[StoredPassage]]:
        for query in queries:
            found = self._client.query_points(
                self._name,
                query=query.tolist(),
                using=self._vector_name,
                limit=depth + 1,  # a stamp may be among them
                with_vectors=True,
                with_payload=True,
            )
            yield [self._passage(point) for point in found.points if str(point.id) != STAMP_ID][:depth]

    def passages(self, ids: Sequence[str]) -> dict[str, StoredPassage]:
        points = self._client.retrieve(self._name, list(ids), with_vectors=True, with_payload=True)
        return {str(point.id): self._passage(point) for point in points}

    def _passage(self, point: Any) -> StoredPassage:
        payload = dict(point.payload or {})
        text = None if "_node_content" in payload else payload.pop(self._text_key, None)
        vector = point.vector if self._vector_name is None else point.vector[self._vector_name]
        return _passage(str(point.id), payload, text, vector)
