"""A stamped index refuses another embedding model, in every kind of store."""

import os
import shutil
import socket
import subprocess
import sys
import time

import chromadb
import pytest
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import AsyncQdrantClient, QdrantClient

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError, WrongIndexError
from llama_index_lora_embed.deployment import IndexStamp, read_index_stamp, stamp_index, verify_index
from llama_index_lora_embed.deployment.index_stamp import STAMP_NAME
from tests.conftest import make_dataset, make_engine

STORES = ["simple", "persisted", "folder", "chroma", "chroma-server", "qdrant"]


@pytest.fixture(scope="module")
def tuned(adapter):
    return LoraEmbedding(adapter, device="cpu")


@pytest.fixture(scope="module")
def base(tiny_model):
    return LoraEmbedding(base_model=tiny_model, device="cpu")


@pytest.fixture(scope="module")
def chroma_server(tmp_path_factory):
    """Port of a local Chroma server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("chroma")
    command = os.path.join(os.path.dirname(sys.executable), "chroma")
    log = open(folder / "log", "wb")  # noqa: SIM115
    server = subprocess.Popen(
        [command, "run", "--path", str(folder / "data"), "--host", "127.0.0.1", "--port", str(port)],
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for _ in range(300):
            try:
                chromadb.HttpClient("127.0.0.1", port).heartbeat()
                break
            except Exception:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait(20)
        log.close()


@pytest.fixture
def store(request, tmp_path, tuned, chroma_server):
    """An index of 24 nodes, and a function that opens it again as another program would."""
    nodes = [TextNode(text=text) for text in make_dataset(seed=1).corpus.values()]
    kind = request.param

    def vector_store():
        if kind == "chroma":
            client = chromadb.PersistentClient(str(tmp_path / "chroma"))
        elif kind == "chroma-server":
            client = chromadb.HttpClient("127.0.0.1", chroma_server)
        elif kind == "qdrant":
            clients.append(QdrantClient(path=str(tmp_path / "qdrant")))
            return QdrantVectorStore("nodes", client=clients[-1])
        else:
            return SimpleVectorStore()
        metadata = {"hnsw:space": "cosine", "owner": "us"}
        return ChromaVectorStore(
            chroma_collection=client.get_or_create_collection(tmp_path.name[-40:], metadata=metadata)
        )

    clients = []

    def opened():
        for client in clients:
            client.close()
        if kind == "folder":
            return tmp_path / "index"
        if kind == "persisted":
            storage = StorageContext.from_defaults(persist_dir=str(tmp_path / "index"))
            return load_index_from_storage(storage, embed_model=tuned)
        if kind == "simple":
            return built
        return VectorStoreIndex.from_vector_store(vector_store(), embed_model=tuned)

    storage = StorageContext.from_defaults(vector_store=vector_store())
    built = VectorStoreIndex([n.model_copy() for n in nodes], storage_context=storage, embed_model=tuned)
    if kind == "folder":
        built.storage_context.persist(str(tmp_path / "index"))
        return tmp_path / "index", opened, nodes, None

    def persist():
        if kind == "persisted":
            built.storage_context.persist(str(tmp_path / "index"))

    persist()
    return built, opened, nodes, persist


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_stamped_index_refuses_another_model_after_it_was_reopened(store, tuned, base):
    index, opened, nodes, persist = store
    assert read_index_stamp(index) is None
    stamp = stamp_index(index, tuned)
    if persist:
        persist()
    again = opened()
    assert read_index_stamp(again) == stamp
    assert verify_index(again, tuned) == stamp
    assert stamp.dimensions == 32
    with pytest.raises(WrongIndexError) as caught:
        verify_index(again, base)
    for part in (tuned.model_name, base.model_name, stamp.created, stamp.trained, "VectorStoreIndex(nodes"):
        assert part
        assert part in str(caught.value)
    with pytest.raises(WrongIndexError):
        stamp_index(again, base)
    assert stamp_index(again, tuned) == stamp, "stamping twice keeps the first date"
    assert stamp_index(again, base, replace=True).fingerprint == base.fingerprint
    verify_index(again, base)
    if isinstance(again, VectorStoreIndex):
        for node in nodes:
            best = again.as_retriever(similarity_top_k=3).retrieve(node.text)
            assert best[0].node.node_id == node.node_id
        everything = again.as_retriever(similarity_top_k=100).retrieve(nodes[0].text)
        assert sorted(hit.node.node_id for hit in everything) == sorted(n.node_id for n in nodes)


@pytest.mark.parametrize("store", ["chroma"], indirect=True)
def test_other_metadata_of_a_collection_is_kept(store, tuned):
    index, opened, _, _ = store
    stamp_index(index, tuned)
    collection = opened().vector_store._collection
    assert collection.metadata["owner"] == "us"
    assert stamp_index(collection, tuned) == read_index_stamp(opened().vector_store)


class QdrantBefore116(QdrantClient):
    """A client that knows no metadata of collections; a server before 1.16 ignores them just so."""

    def update_collection(self, collection_name, metadata=None, **kwargs):
        return False


def test_qdrant_before_collections_had_metadata_keeps_the_stamp_as_the_last_entry(tuned, base):
    client = QdrantBefore116(":memory:")
    storage = StorageContext.from_defaults(vector_store=QdrantVectorStore("nodes", client=client))
    nodes = [TextNode(text=text) for text in make_dataset(seed=1).corpus.values()]
    index = VectorStoreIndex(nodes, storage_context=storage, embed_model=tuned)
    stamp = stamp_index(index, tuned)
    assert read_index_stamp(index) == stamp
    with pytest.raises(WrongIndexError):
        verify_index(index, base)
    for text in ("w1", nodes[5].text):
        hits = index.as_retriever(similarity_top_k=len(nodes)).retrieve(text)
        assert {hit.node.node_id for hit in hits} == {node.node_id for node in nodes}
        *_, last = index.as_retriever(similarity_top_k=100).retrieve(text)
        assert last.node.text == ""
        assert "lora_embed_stamp" in last.node.metadata


def test_a_stamp_among_the_entries_of_qdrant_moves_into_the_metadata_when_it_is_replaced(tuned):
    client = QdrantClient(":memory:")
    store = QdrantVectorStore("nodes", client=client)
    store.add([TextNode(text="w1", embedding=tuned.get_text_embedding("w1"))])
    client.update_collection("nodes", metadata={"owner": "us"})
    update, client.update_collection = client.update_collection, lambda name, metadata: False
    stamp = stamp_index(store, tuned)
    client.update_collection = update
    assert len(store.get_nodes()) == 2
    assert stamp_index(store, tuned) == stamp
    assert stamp_index(store, tuned, replace=True).fingerprint == stamp.fingerprint
    assert [node.text for node in store.get_nodes()] == ["w1"]
    assert verify_index(store, tuned) is not None
    assert client.get_collection("nodes").config.metadata["owner"] == "us"


def test_a_qdrant_collection_that_was_not_built_yet_has_no_stamp_and_gets_none(tuned):
    store = QdrantVectorStore("nodes", client=QdrantClient(":memory:"))
    assert read_index_stamp(store) is None
    with pytest.raises(ConfigError, match="'nodes', which does not exist"):
        stamp_index(store, tuned)


def test_a_qdrant_store_with_an_asynchronous_client_alone_is_refused(tuned):
    store = QdrantVectorStore("nodes", aclient=AsyncQdrantClient(":memory:"))
    with pytest.raises(ConfigError, match="synchronous client"):
        stamp_index(store, tuned)


def test_an_index_without_a_stamp_warns_raises_or_passes_as_asked(tuned):
    index = VectorStoreIndex([TextNode(text="w1")], embed_model=tuned)
    with pytest.warns(UserWarning, match="model of its vectors is unknown"):
        assert verify_index(index, tuned) is None
    with pytest.raises(WrongIndexError, match="model of its vectors is unknown"):
        verify_index(index, tuned, without_stamp="raise")
    assert verify_index(index, tuned, without_stamp="ignore") is None
    with pytest.raises(ConfigError, match="without_stamp='no'"):
        verify_index(index, tuned, without_stamp="no")


def test_a_retrained_adapter_is_another_model(tuned, adapter, tmp_path, tiny_model):
    path = tmp_path / "adapter"
    shutil.copytree(adapter, path)
    index = VectorStoreIndex([TextNode(text="w1")], embed_model=tuned)
    stamp_index(index, LoraEmbedding(path, device="cpu"))
    verify_index(index, tuned)  # the same adapter elsewhere
    make_engine(tiny_model, path, make_dataset(seed=3), val_dataset=None, val_fraction=0.0, epochs=1).finetune()
    with pytest.raises(WrongIndexError, match="trained 20"):
        verify_index(index, LoraEmbedding(path, device="cpu"))


def test_another_prompt_or_scale_is_another_model(tuned, adapter):
    index = VectorStoreIndex([TextNode(text="w1")], embed_model=tuned)
    stamp_index(index, tuned)
    for changed in ({"passage_prompt": "passage : "}, {"adapter_scale": 0.5}):
        with pytest.raises(WrongIndexError):
            verify_index(index, LoraEmbedding(adapter, device="cpu", **changed))


def test_other_embedding_models_are_stamped_by_their_settings():
    index = VectorStoreIndex([TextNode(text="w1")], embed_model=MockEmbedding(embed_dim=4, model_name="a"))
    stamp_index(index, MockEmbedding(embed_dim=4, model_name="a"))
    verify_index(index, MockEmbedding(embed_dim=4, model_name="a"))
    with pytest.raises(WrongIndexError, match="'b'"):
        verify_index(index, MockEmbedding(embed_dim=4, model_name="b"))


def test_persisting_another_index_over_a_stamped_one_removes_the_stamp(tuned, base, tmp_path):
    index = VectorStoreIndex([TextNode(text="w1")], embed_model=tuned)
    stamp_index(index, tuned)
    index.storage_context.persist(str(tmp_path))
    verify_index(tmp_path, tuned)
    VectorStoreIndex([TextNode(text="w1")], embed_model=base).storage_context.persist(str(tmp_path))
    assert read_index_stamp(tmp_path) is None
    stamp_index(tmp_path, base)
    with pytest.raises(WrongIndexError):
        verify_index(
            load_index_from_storage(StorageContext.from_defaults(persist_dir=str(tmp_path)), embed_model=tuned), tuned
        )


def test_another_number_of_dimensions_is_another_model():
    index = VectorStoreIndex([TextNode(text="w1")], embed_model=MockEmbedding(embed_dim=4))
    stamp_index(index, MockEmbedding(embed_dim=4))
    with pytest.raises(WrongIndexError, match="8 dimensions"):
        verify_index(index, MockEmbedding(embed_dim=8))


def test_a_stamp_of_an_earlier_release_is_read_from_every_store(tmp_path):
    node_id = "94cc0c64-714d-51f6-8156-76aa79898940"
    stored = (
        '{"created": "2026-07-01T10:00:00+00:00", "dimensions": 32, "fingerprint": "abc", "model_name": "run", '
        '"trained": "2026-06-30T10:00:00+00:00"}'
    )
    simple = SimpleVectorStore()
    simple.data.metadata_dict[node_id] = {"lora_embed_stamp": stored}
    StorageContext.from_defaults(vector_store=simple).persist(str(tmp_path / "persisted"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lora_embed_stamp.json").write_text(stored)
    collection = chromadb.EphemeralClient().get_or_create_collection("old", metadata={"lora_embed_stamp": stored})
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    qdrant = QdrantVectorStore("nodes", client=client)
    qdrant.add([TextNode(id_=node_id, text="", metadata={"lora_embed_stamp": stored}, embedding=[1.0] * 32)])
    expected = IndexStamp("abc", "run", 32, "2026-07-01T10:00:00+00:00", "2026-06-30T10:00:00+00:00")
    for target in (simple, tmp_path / "persisted", tmp_path / "other", collection, qdrant):
        assert read_index_stamp(target) == expected
    client.close()


def test_a_damaged_stamp_raises(tuned, tmp_path):
    (tmp_path / STAMP_NAME).write_text('{"finger')
    for call in (verify_index, stamp_index):
        with pytest.raises(WrongIndexError, match="cannot be read"):
            call(tmp_path, tuned)
    stamp_index(tmp_path, tuned, replace=True)
    verify_index(tmp_path, tuned)


def test_a_full_or_read_only_folder_leaves_nothing_half_written(tuned, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputDirectoryError, match="No space left"):
        stamp_index(tmp_path, tuned)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [None, 3, {"a": 1}, object()])
def test_a_target_that_is_not_an_index_is_refused(tuned, target):
    with pytest.raises(ConfigError, match="to be stamped"):
        stamp_index(target, tuned)


def test_a_missing_folder_and_a_store_of_vectors_alone_are_refused(tuned, tmp_path):
    import faiss
    from llama_index.core.vector_stores.types import BasePydanticVectorStore

    class VectorsAlone(BasePydanticVectorStore):
        stores_text: bool = False

        @property
        def client(self):
            return faiss.IndexFlatIP(4)

        def add(self, nodes, **kwargs):
            return []

        def delete(self, ref_doc_id, **kwargs):
            return None

        def query(self, query, **kwargs):
            return None

    with pytest.raises(ConfigError, match=r"vectors alone.*stamp_index\(persist_dir"):
        stamp_index(VectorsAlone(), tuned)
    with pytest.raises(ConfigError, match="not a folder"):
        stamp_index(tmp_path / "nowhere", tuned)
