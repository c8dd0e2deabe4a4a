"""Passages and vectors of an existing index, read by the store's own API without embedding anything."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode, NodeRelationship, RelatedNodeInfo, TextNode

from llama_index_lora_embed.config import STAMP_ID
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, warn_user
from llama_index_lora_embed.data.stored_vectors import COSINE, FloatArray, StoredVectors

_PAGE = 1000  # entries that are asked for at once


def read_vectors(store: Any) -> StoredVectors:
    """Everything that a vector store holds, by its own API; nothing in the store is changed.

    An entry that `stamp_index` wrote is left out. A SimpleVectorStore and FAISS keep no texts: these come from the
    docstore of an index or a `StorageContext`. This package compares vectors by cosine similarity; a warning is issued
    where the store ranks otherwise and the norms of its vectors differ, so that its rankings do, too.

    Args:
        store: A Chroma collection, LlamaIndex's vector store of Chroma, FAISS or Qdrant (with a synchronous client), a
            `SimpleVectorStore`; an index or a `StorageContext` on one of them, or the folder of a persisted one with a
            `SimpleVectorStore`; or `StoredVectors`, which are returned as they are.

    Raises:
        ConfigError: The store has no call that lists its vectors; the message names those that are looked for. Or the
            folder does not load.
        DatasetError: As `StoredVectors`.
    """
    if isinstance(store, StoredVectors):
        return store
    if isinstance(store, (str, os.PathLike)):
        from llama_index.core import StorageContext

        try:
            store = StorageContext.from_defaults(persist_dir=os.fspath(store))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{os.fspath(store)!r}, which does not load as a persisted StorageContext ({error})",
                "the folder of one with a SimpleVectorStore",
                "Check the path; for another store, load the index with it and pass the index.",
            ) from error
    vectors = getattr(store, "vector_store", store)
    vectors = getattr(vectors, "_collection", vectors)  # of a ChromaVectorStore
    module = type(vectors).__module__
    reader = next((reader for name, reader in _READERS.items() if module.startswith(name)), None)
    if reader is None:
        raise _cannot_list(
            type(vectors).__name__,
            "it has none of the calls that are looked for (get of a Chroma collection, data of a SimpleVectorStore, "
            "reconstruct_n of FAISS, scroll of Qdrant)",
        )
    stored = StoredVectors(*reader(vectors, store))
    if stored.metric != COSINE and stored.norms_differ:
        warn_user(
            f"The store ranks by {stored.metric!r}, and the norms of its vectors differ: training and evaluation use "
            "cosine similarity, which ranks differently. Rebuild the index with unit vectors or cosine similarity."
        )
    return stored


_Read = tuple[list[BaseNode], FloatArray, str]


def _cannot_list(kind: str, why: str) -> ConfigError:
    return ConfigError(
        f"a {kind}, which cannot list its vectors: {why}",
        "a Chroma collection, a SimpleVectorStore, a FAISS or Qdrant store, or an index or StorageContext on one",
        "Read nodes and vectors as the store allows, and pass StoredVectors(nodes, vectors).",
    )


def _matrix(rows: Sequence[Any]) -> FloatArray:
    """Vectors [rows, dimensions]; [0, 0] for none.

    Raises:
        DatasetError: They differ in length.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise DatasetError(
            f"stored vectors of different lengths ({', '.join(map(str, sorted(lengths)))})",
            "vectors of one model",
            "Rebuild the index with one model.",
        )
    return np.asarray(rows, dtype=np.float32).reshape(len(rows), -1 if rows else 0)


def node_of_entry(entry_id: str, metadata: Mapping[str, Any], text: str | None) -> BaseNode:
    """The node of an entry. Of one that LlamaIndex has not written, the text alone was embedded."""
    from llama_index.core.vector_stores.utils import metadata_dict_to_node

    if "_node_content" in metadata:
        return metadata_dict_to_node(dict(metadata), text=text)
    kept = dict(metadata)
    return TextNode(id_=entry_id, text=text or "", metadata=kept, excluded_embed_metadata_keys=list(kept))


def _read_chroma(collection: Any, store: Any) -> _Read:
    if inspect.iscoroutinefunction(getattr(collection, "get", None)):
        raise _cannot_list("asynchronous Chroma collection", "no synchronous get (chromadb.HttpClient has one)")
    nodes: list[BaseNode] = []
    rows: list[Any] = []
    while True:
        page = collection.get(limit=_PAGE, offset=len(nodes), include=["embeddings", "documents", "metadatas"])
        entries = zip(page["ids"], page["metadatas"], page["documents"], strict=True)
        nodes += [node_of_entry(entry_id, metadata or {}, text) for entry_id, metadata, text in entries]
        rows += list(page["embeddings"])
        if len(page["ids"]) < _PAGE:
            break
    configuration = collection.configuration
    space = next((c["space"] for n in ("hnsw", "spann") if (c := configuration.get(n)) and c.get("space")), "l2")
    return nodes, _matrix(rows), space


def _read_simple(vectors: Any, store: Any) -> _Read:
    data = vectors.data
    nodes = _with_texts(store, {i: i for i in data.embedding_dict}, data.text_id_to_ref_doc_id)
    return nodes, _matrix(list(data.embedding_dict.values())), COSINE


def _read_faiss(vectors: Any, store: Any) -> _Read:
    import faiss

    index = vectors.client
    id_map = getattr(index, "id_map", None)
    numbers = range(index.ntotal) if id_map is None else faiss.vector_to_array(id_map).tolist()
    try:
        array = (index if id_map is None else index.index).reconstruct_n(0, index.ntotal)
    except RuntimeError as error:
        raise _cannot_list(f"faiss.{type(index).__name__}", f"no reconstruct_n ({error})") from error
    # the ids of nodes are in a map of the store's own, or in the index's structure
    names = getattr(vectors, "_faiss_id_to_node_id_map", None) or _node_ids(store)
    nodes = _with_texts(store, {str(number): str(names.get(number, number)) for number in numbers}, {})
    metric = "inner product" if index.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"
    return nodes, array.astype(np.float32), metric


def _read_qdrant(vectors: Any, store: Any) -> _Read:
    client = vectors.client
    if client is None:
        raise _cannot_list("QdrantVectorStore without a synchronous client", "no synchronous scroll")
    name, nodes, rows, offset = vectors.collection_name, list[BaseNode](), list[Any](), None
    if not client.collection_exists(name):
        return nodes, _matrix(rows), COSINE
    params = client.get_collection(name).config.params.vectors
    params = params.get(vectors.dense_vector_name) if isinstance(params, dict) else params
    while True:
        points, offset = client.scroll(name, limit=_PAGE, offset=offset, with_vectors=True, with_payload=True)
        for point in (point for point in points if str(point.id) != STAMP_ID):
            payload = dict(point.payload or {})
            text = None if "_node_content" in payload else payload.pop(vectors.text_key, None)
            nodes.append(node_of_entry(str(point.id), payload, text))
            of_name = isinstance(point.vector, dict)
            rows.append(point.vector[vectors.dense_vector_name] if of_name else point.vector)
        if offset is None:
            break
    return nodes, _matrix(rows), params.distance.value.lower() if params is not None else "unknown"


def _node_ids(store: Any) -> dict[int, str]:
    """Node ids by the number of a FAISS vector, as the structure of a `VectorStoreIndex` has them."""
    structures = [store.index_struct] if hasattr(store, "index_struct") else []
    if hasattr(store, "index_store"):
        structures = store.index_store.index_structs()
    found = [nodes for s in structures if (nodes := getattr(s, "nodes_dict", None))]
    return {int(number): node_id for number, node_id in found[0].items()} if len(found) == 1 else {}


def _with_texts(store: Any, ids: Mapping[str, str], sources: Mapping[str, str]) -> list[BaseNode]:
    """The nodes of a store that keeps vectors alone: those of the docstore, and nodes without text for the others.

    Args:
        store: What may have a docstore.
        ids: Node id of each entry, in their order.
        sources: Ids of source documents, where the store keeps them.
    """
    docstore = getattr(store, "docstore", None)
    found = {} if docstore is None else {n.node_id: n for n in docstore.get_nodes([*ids.values()], raise_error=False)}
    nodes = []
    for entry, node_id in ids.items():
        node = found.get(node_id) or TextNode(id_=node_id, text="")
        if node_id not in found and (source := sources.get(entry, "None")) != "None":
            node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=source)
        nodes.append(node)
    return nodes


_READERS: dict[str, Callable[[Any, Any], _Read]] = {
    "chromadb.": _read_chroma,
    "llama_index.core.vector_stores.simple": _read_simple,
    "llama_index.vector_stores.faiss": _read_faiss,
    "llama_index.vector_stores.qdrant": _read_qdrant,
}
