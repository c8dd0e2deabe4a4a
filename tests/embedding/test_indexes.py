"""A tuned model in LlamaIndex indexes, in memory and in Chroma."""

import chromadb
import numpy as np
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import TextNode
from llama_index.vector_stores.chroma import ChromaVectorStore

from llama_index_lora_embed import LoraEmbedding
from tests.conftest import make_dataset


@pytest.fixture(scope="module")
def embed_model(adapter):
    return LoraEmbedding(adapter, device="cpu")


@pytest.fixture
def nodes():
    return [TextNode(text=text, id_=i) for i, text in make_dataset().corpus.items()]


def exact_ranking(embed_model, nodes, query, top_k):
    vectors = np.array(embed_model.get_text_embedding_batch([node.text for node in nodes]))
    scores = vectors @ np.array(embed_model.get_query_embedding(query))
    return [nodes[i].node_id for i in np.argsort(-scores)[:top_k]]


def test_an_index_retrieves_the_exact_ranking(embed_model, nodes):
    retriever = VectorStoreIndex(nodes, embed_model=embed_model).as_retriever(similarity_top_k=5)
    for query in ("w1 w2 ?", "w50 w60 ?"):
        found = [hit.node.node_id for hit in retriever.retrieve(query)]
        assert found == exact_ranking(embed_model, nodes, query, 5)


def test_a_persisted_index_reopens_with_the_same_ranking(embed_model, nodes, tmp_path, adapter):
    VectorStoreIndex(nodes, embed_model=embed_model).storage_context.persist(str(tmp_path))
    storage = StorageContext.from_defaults(persist_dir=str(tmp_path))
    index = load_index_from_storage(storage, embed_model=LoraEmbedding(adapter, device="cpu"))
    found = [hit.node.node_id for hit in index.as_retriever(similarity_top_k=5).retrieve("w1 w2 ?")]
    assert found == exact_ranking(embed_model, nodes, "w1 w2 ?", 5)


def test_a_persistent_chroma_collection_reopens_with_the_same_ranking(embed_model, nodes, tmp_path, adapter):
    def collection():
        client = chromadb.PersistentClient(str(tmp_path / "chroma"))
        return client.get_or_create_collection("nodes", configuration={"hnsw": {"space": "cosine"}})

    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection()))
    VectorStoreIndex(nodes, storage_context=storage, embed_model=embed_model)
    reopened = collection()
    assert reopened.count() == len(nodes)
    index = VectorStoreIndex.from_vector_store(
        ChromaVectorStore(chroma_collection=reopened), embed_model=LoraEmbedding(adapter, device="cpu")
    )
    found = [hit.node.node_id for hit in index.as_retriever(similarity_top_k=5).retrieve("w1 w2 ?")]
    assert found == exact_ranking(embed_model, nodes, "w1 w2 ?", 5)


def test_an_ingestion_pipeline_writes_to_chroma(embed_model):
    collection = chromadb.EphemeralClient().get_or_create_collection("pipeline")
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=32, chunk_overlap=0), embed_model],
        vector_store=ChromaVectorStore(chroma_collection=collection),
    )
    nodes = pipeline.run(documents=[Document(text=" ".join(f"w{i}" for i in range(100)))])
    assert collection.count() == len(nodes) > 1
    stored = np.array(collection.get(ids=[nodes[0].node_id], include=["embeddings"])["embeddings"][0])
    assert np.abs(stored - np.array(nodes[0].embedding)).max() < 1e-6
