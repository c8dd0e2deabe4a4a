"""Reading what an index holds: every store gives the same passages and vectors, and what cannot be read is named."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import faiss
import numpy as np
import pytest
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.faiss import FaissMapVectorStore, FaissVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import AsyncQdrantClient, QdrantClient

from llama_index_lora_embed.config import STAMP_ID
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data import StoredVectors, read_vectors
from llama_index_lora_embed.data.readers import vector_stores
from llama_index_lora_embed.deployment import stamp_index

DIMENSIONS = 8


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_stores, "_PAGE", 4)


@pytest.fixture
def given() -> dict[str, TextNode]:
    """Ten nodes of two documents, with metadata that is embedded, and unit vectors."""
    rng = np.random.default_rng(0)
    nodes = {}
    for number in range(10):
        vector = rng.normal(size=DIMENSIONS)
        node = TextNode(
            id_=str(uuid.UUID(int=number + 1)),
            text=f"passage number {number}",
            metadata={"title": f"title {number}", "secret": "not embedded"},
            excluded_embed_metadata_keys=["secret"],
            embedding=(vector / np.linalg.norm(vector)).tolist(),
        )
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"document {number // 5}")
        nodes[node.node_id] = node
    return nodes


@pytest.fixture
def chroma(tmp_path: Path) -> Any:
    return chromadb.PersistentClient(str(tmp_path / "chroma")).create_collection("passages")


def indexed(nodes: dict[str, TextNode], vector_store: BasePydanticVectorStore) -> VectorStoreIndex:
    """An index of the nodes with their own vectors, built as users build it."""
    storage = StorageContext.from_defaults(vector_store=vector_store)
    return VectorStoreIndex(
        [node.model_copy() for node in nodes.values()],
        storage_context=storage,
        embed_model=MockEmbedding(embed_dim=DIMENSIONS),
        store_nodes_override=not vector_store.stores_text,
    )


@pytest.fixture(params=["chroma", "collection", "simple", "folder", "storage", "faiss", "faiss-map", "qdrant"])
def target(request: pytest.FixtureRequest, given: dict[str, TextNode], chroma: Any, tmp_path: Path) -> Iterator[Any]:
    kind, clients = request.param, []
    if kind in ("chroma", "collection"):
        index = indexed(given, ChromaVectorStore(chroma_collection=chroma))
    elif kind == "faiss":
        index = indexed(given, FaissVectorStore(faiss.IndexFlatL2(DIMENSIONS)))
    elif kind == "faiss-map":
        index = indexed(given, FaissMapVectorStore(faiss.IndexIDMap2(faiss.IndexHNSWFlat(DIMENSIONS, 8))))
    elif kind == "qdrant":
        clients.append(QdrantClient(path=str(tmp_path / "qdrant")))
        index = indexed(given, QdrantVectorStore("nodes", client=clients[0]))
    else:
        index = indexed(given, SimpleVectorStore())
    if kind == "folder":
        index.storage_context.persist(str(tmp_path / "index"))
    yield {"collection": chroma, "folder": tmp_path / "index", "storage": index.storage_context}.get(kind, index)
    for client in clients:
        client.close()


def test_every_store_gives_ids_embedded_texts_source_documents_and_vectors(
    target: Any, given: dict[str, TextNode]
) -> None:
    stored = read_vectors(target)
    assert sorted(stored.ids) == sorted(given)
    assert stored.vectors.dtype == np.float32
    for node, text, vector in zip(stored.nodes, stored.texts, stored.vectors, strict=True):
        expected = given[node.node_id]
        assert text == f"title: {expected.metadata['title']}\n\n{expected.text}"
        assert node.ref_doc_id == expected.ref_doc_id
        np.testing.assert_allclose(vector, np.float32(expected.embedding), atol=1e-6)
    assert not stored.norms_differ


def test_the_entry_of_a_stamp_is_no_passage(given: dict[str, TextNode], tmp_path: Path) -> None:
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    simple, qdrant = indexed(given, SimpleVectorStore()), indexed(given, QdrantVectorStore("nodes", client=client))
    stamp_index(simple, MockEmbedding(embed_dim=DIMENSIONS))
    # as stores keep it that have no metadata of a collection
    entry = TextNode(id_=STAMP_ID, text="", metadata={"lora_embed_stamp": "{}"}, embedding=[-1.0] * DIMENSIONS)
    qdrant.vector_store.add([entry])
    for index in (qdrant, simple):
        assert sorted(read_vectors(index).ids) == sorted(given)
    client.close()


def test_stores_without_texts_give_ids_and_unlike_texts_in_their_place(given: dict[str, TextNode]) -> None:
    simple = indexed(given, SimpleVectorStore()).vector_store
    stored = read_vectors(simple)
    assert sorted(stored.ids) == sorted(given)
    assert not any(stored.has_text)
    assert len(set(stored.texts)) == len(given)
    assert {node.ref_doc_id for node in stored.nodes} == {"document 0", "document 1"}
    flat = faiss.IndexFlatIP(DIMENSIONS)
    flat.add(np.eye(DIMENSIONS, dtype=np.float32))
    assert read_vectors(FaissVectorStore(flat)).ids == [str(i) for i in range(DIMENSIONS)]
    mapped = indexed(given, FaissMapVectorStore(faiss.IndexIDMap(faiss.IndexFlatL2(DIMENSIONS)))).vector_store
    mapped.delete_nodes([next(iter(given))])
    assert sorted(read_vectors(mapped).ids) == sorted(given)[1:]


def test_a_collection_that_llama_index_has_not_written_is_read_as_its_documents(chroma: Any) -> None:
    vectors = np.eye(3, DIMENSIONS, dtype=np.float32)
    chroma.add(ids=["a", "b"], embeddings=vectors[:2], documents=["one", "two"], metadatas=[{"page": 1}, {"page": 2}])
    chroma.add(ids=["c"], embeddings=vectors[2:])
    stored = read_vectors(chroma)
    assert (stored.ids, stored.texts[:2], stored.has_text) == (["a", "b", "c"], ["one", "two"], [True, True, False])
    assert stored.nodes[1].metadata == {"page": 2}
    np.testing.assert_array_equal(stored.vectors, vectors)


def test_a_folder_that_does_not_load_says_what_to_pass(given: dict[str, TextNode], tmp_path: Path) -> None:
    indexed(given, FaissVectorStore(faiss.IndexFlatL2(DIMENSIONS))).storage_context.persist(str(tmp_path / "faiss"))
    for folder in (tmp_path / "faiss", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="pass the index") as caught:
            read_vectors(folder)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", ["chroma", "simple", "faiss", "qdrant", "nothing-there"])
def test_an_empty_store_is_named(kind: str, chroma: Any, tmp_path: Path) -> None:
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    qdrant = QdrantVectorStore("nodes", client=client)
    if kind == "qdrant":
        node = TextNode(text="a", embedding=[1.0] * DIMENSIONS)
        qdrant.add([node])
        qdrant.delete_nodes([node.node_id])
    store = {"chroma": chroma, "simple": SimpleVectorStore(), "faiss": FaissVectorStore(faiss.IndexFlatL2(DIMENSIONS))}
    with pytest.raises(DatasetError, match="without vectors"):
        read_vectors(store.get(kind, qdrant))
    client.close()


def test_vectors_that_no_query_can_be_compared_with_are_named_by_their_ids(given: dict[str, TextNode]) -> None:
    index = indexed(given, SimpleVectorStore())
    data, ids = index.vector_store.data.embedding_dict, list(given)  # type: ignore[attr-defined]
    data[ids[1]], data[ids[2]], data[ids[3]] = (
        [0.0] * DIMENSIONS,
        [float("nan")] * DIMENSIONS,
        [float("inf")] * DIMENSIONS,
    )
    with pytest.raises(DatasetError, match="3 of 10 stored vectors") as caught:
        read_vectors(index)
    assert caught.value.problems == [
        f"{ids[1]!r}: the zero vector",
        f"{ids[2]!r}: NaN or infinity",
        f"{ids[3]!r}: NaN or infinity",
    ]
    data[ids[1]] = [1.0]
    with pytest.raises(DatasetError, match="different lengths"):
        read_vectors(index)


def test_nodes_and_vectors_of_one_s_own_are_checked_the_same_way(given: dict[str, TextNode]) -> None:
    nodes = list(given.values())
    vectors = np.float32([node.embedding for node in nodes])
    stored = StoredVectors(nodes, vectors)
    assert read_vectors(stored) is stored
    with pytest.raises(DatasetError, match="1 ids with several vectors") as caught:
        StoredVectors([*nodes, nodes[0]], np.concatenate([vectors, vectors[:1]]))
    assert caught.value.problems == [nodes[0].node_id]
    with pytest.raises(DatasetError, match="for 10 nodes"):
        StoredVectors(nodes, vectors[1:])


def test_differing_norms_are_warned_of_where_the_store_does_not_rank_by_cosine(
    given: dict[str, TextNode], tmp_path: Path
) -> None:
    client = chromadb.PersistentClient(str(tmp_path / "norms"))
    vectors = np.float32([node.embedding for node in given.values()])
    longer = vectors * np.arange(1, 11, dtype=np.float32)[:, None]

    def collection(name: str, embeddings: np.ndarray, space: str) -> Any:
        made = client.create_collection(name, configuration={"hnsw": {"space": space}})  # type: ignore[arg-type]
        made.add(ids=list(given), embeddings=embeddings)
        return made

    with pytest.warns(UserWarning, match=r"ranks by 'l2', and the norms of its vectors differ.*cosine"):
        assert read_vectors(collection("l2-long", longer, "l2")).norms_differ
    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(longer)
    with pytest.warns(UserWarning, match="ranks by 'inner product'"):
        read_vectors(FaissVectorStore(index))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_vectors(collection("l2-unit", vectors, "l2"))
        read_vectors(collection("cosine-long", longer, "cosine"))


def test_a_store_that_cannot_list_its_vectors_says_which_calls_it_lacks() -> None:
    class Remote(BasePydanticVectorStore):
        stores_text: bool = True

        @property
        def client(self) -> None:
            return None

        def add(self, nodes: Any, **kwargs: Any) -> list[str]:
            return []

        def delete(self, ref_doc_id: str, **kwargs: Any) -> None:
            return None

        def query(self, query: Any, **kwargs: Any) -> Any:
            return None

    with pytest.raises(ConfigError, match=r"Remote.*get of a Chroma.*StoredVectors\(nodes, vectors\)"):
        read_vectors(Remote())
    hashes = faiss.IndexIVFSpectralHash(faiss.IndexFlatL2(DIMENSIONS), DIMENSIONS, 1, 8, 1.0)
    vectors = np.tile(np.eye(DIMENSIONS, dtype=np.float32), (8, 1))
    hashes.train(vectors)
    hashes.add(vectors)
    with pytest.raises(ConfigError, match=r"IndexIVFSpectralHash.*no reconstruct_n"):
        read_vectors(FaissVectorStore(hashes))
    with pytest.raises(ConfigError, match="no synchronous scroll"):
        read_vectors(QdrantVectorStore("nodes", aclient=AsyncQdrantClient(":memory:")))
