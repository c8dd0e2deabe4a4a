"""Mining in a vector store: what mining in memory finds, without embedding a passage."""

import chromadb
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data import read_vectors
from llama_index_lora_embed.training.negatives import mine_from_store, mine_hard_negatives
from tests.conftest import make_dataset

SETTINGS = MiningSettings(show_progress_bar=False, sibling_window=None, relative_margin=None, absolute_margin=0.01)


def index_of(dataset, embed_model, store):
    nodes = []
    for passage_id, text in dataset.corpus.items():
        node = TextNode(id_=passage_id, text=text)
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=dataset.source_of(passage_id))
        nodes.append(node)
    return VectorStoreIndex(
        nodes, embed_model=embed_model, storage_context=StorageContext.from_defaults(vector_store=store)
    )


def chroma():
    client = chromadb.EphemeralClient()
    name = f"c{len(client.list_collections())}-mining"
    return ChromaVectorStore(client.create_collection(name, configuration={"hnsw": {"space": "cosine"}}))


def uuids(dataset):
    """The dataset with ids that Qdrant takes."""
    import uuid

    names = {i: str(uuid.uuid5(uuid.NAMESPACE_OID, i)) for i in dataset.corpus}
    return dataset.model_copy(
        update={
            "corpus": {names[i]: text for i, text in dataset.corpus.items()},
            "relevant_docs": {q: [names[i] for i in ids] for q, ids in dataset.relevant_docs.items()},
            "source_documents": {names[i]: source for i, source in dataset.source_documents.items()},
        }
    )


@pytest.fixture(scope="module")
def embed_model(tiny_model):
    return LoraEmbedding(base_model=tiny_model, device="cpu")


@pytest.mark.parametrize("make", [chroma, lambda: QdrantVectorStore("nodes", client=QdrantClient(":memory:"))])
def test_the_negatives_are_those_of_mining_in_memory(make, embed_model, monkeypatch):
    dataset = uuids(make_dataset(passages=60, questions=1))
    store = make()
    index_of(dataset, embed_model, store)
    expected, _ = mine_hard_negatives(dataset, embed_model.sentence_transformer, SETTINGS)
    monkeypatch.setattr(LoraEmbedding, "get_text_embedding_batch", None)  # passages are not embedded
    few = dataset.subset(list(dataset.queries)[:20])
    mined, report = mine_from_store(few, embed_model, store, SETTINGS)
    assert mined.hard_negatives == {q: expected.hard_negatives[q] for q in few.queries}
    assert report.with_negatives == 20
    added = mined.corpus.keys() - few.corpus.keys()
    assert added, "negatives that were not in the corpus come with their texts"
    assert all(mined.corpus[i] == dataset.corpus[i] for i in added)
    assert all(mined.source_of(i) == dataset.source_of(i) for i in added)


def test_a_store_without_the_answers_is_refused(embed_model):
    dataset, store = make_dataset(passages=6), chroma()
    index_of(dataset.subset(["q0-0"]), embed_model, store)
    with pytest.raises(DatasetError, match="5 passages that answer queries and are not in the store"):
        mine_from_store(dataset, embed_model, store, SETTINGS)


def test_a_store_whose_search_returns_no_vectors_is_mined_in_memory(embed_model):
    dataset = make_dataset(passages=10, questions=1)
    index = index_of(dataset, embed_model, SimpleVectorStore())
    with pytest.raises(ConfigError, match=r"read_vectors\(store\)\.corpus_for\(dataset\)"):
        mine_from_store(dataset, embed_model, index, SETTINGS)
    wide = read_vectors(index).corpus_for(dataset)
    assert mine_hard_negatives(wide, embed_model.sentence_transformer, SETTINGS)[1].with_negatives == 10
