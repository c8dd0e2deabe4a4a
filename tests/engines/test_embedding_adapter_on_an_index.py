"""`EmbeddingAdapterFinetuneEngine.from_vector_store`: a map is trained over the vectors of an index, which stays."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
import torch
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.vector_stores.chroma import ChromaVectorStore

from llama_index_lora_embed import (
    EmbeddingAdapterFinetuneEngine,
    EmbeddingQAFinetuneDataset,
    LabelledPairs,
    evaluate_retrieval,
)
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, WrongIndexError
from llama_index_lora_embed.data import StoredVectors, read_vectors
from llama_index_lora_embed.deployment import stamp_index, verify_index
from llama_index_lora_embed.embedding.adapter_embedding import PROBE
from llama_index_lora_embed.evaluation import Verdict, evaluate_index
from llama_index_lora_embed.evaluation.embeddings import _PROBE
from tests.conftest import make_dataset
from tests.helpers.embedding_models import DIMENSIONS, PaidEmbedding, paid_twice, turned
from tests.helpers.training import signal_in


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_INDEX_CACHE_DIR", str(tmp_path / "llama_index"))


@pytest.fixture(scope="module")
def data() -> EmbeddingQAFinetuneDataset:
    return make_dataset(passages=80)


@pytest.fixture
def collection(data: EmbeddingQAFinetuneDataset, tmp_path: Path) -> Any:
    return in_chroma(data, PaidEmbedding(), tmp_path / "chroma")


def in_chroma(data: EmbeddingQAFinetuneDataset, embed_model: BaseEmbedding, folder: Path) -> Any:
    """A Chroma collection of the passages."""
    collection = chromadb.PersistentClient(str(folder)).create_collection("passages")
    nodes = [TextNode(id_=i, text=text) for i, text in data.corpus.items()]
    for node in nodes:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=data.source_of(node.node_id))
    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    VectorStoreIndex(nodes, storage_context=storage, embed_model=embed_model)
    return collection


def content(collection: Any) -> dict[str, bytes]:
    """Every vector of a collection."""
    found = collection.get(include=["embeddings"])
    return {i: np.asarray(v).tobytes() for i, v in zip(found["ids"], found["embeddings"], strict=True)}


def parts(data: EmbeddingQAFinetuneDataset) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """Queries about the first sixty passages and about the others, each without the other passages."""
    queries = list(data.queries)
    return data.subset(queries[:120]), data.subset(queries[120:])


def engine(store: Any, data: EmbeddingQAFinetuneDataset, out: Path, model: Any = None, **kwargs: Any) -> Any:
    train, val = parts(data)
    settings = {"epochs": 20, "learning_rate": 0.02, "identity_weight": 1.0, "batch_size": 32, "negatives": "corpus"}
    return EmbeddingAdapterFinetuneEngine.from_vector_store(
        store, train, model or PaidEmbedding(), **{"val_dataset": val, "model_output_path": out, **settings, **kwargs}
    )


def test_a_retriever_over_the_untouched_collection_improves_and_no_passage_is_embedded_again(
    collection: Any, data: EmbeddingQAFinetuneDataset, tmp_path: Path
) -> None:
    stamp_index(collection, PaidEmbedding())
    before, model = content(collection), PaidEmbedding()
    run = engine(collection, data, tmp_path / "adapter", model)
    assert run.dataset.corpus == run.val_dataset.corpus == data.corpus
    result = run.finetune()
    assert result.verdict is Verdict.BETTER
    assert set(model.paid) == {*data.queries.values(), PROBE, _PROBE, "dimensions"}
    tuned = run.get_finetuned_model()
    verify_index(collection, tuned, without_stamp="raise")
    store, val = ChromaVectorStore(chroma_collection=collection), run.val_dataset
    found = [
        evaluate_index(
            VectorStoreIndex.from_vector_store(store, embed_model=m).as_retriever(similarity_top_k=10), val
        ).metrics["ndcg@10"]
        for m in (model, tuned)
    ]
    assert found == pytest.approx([result.base_metrics["ndcg@10"], result.tuned_metrics["ndcg@10"]], abs=1e-6)
    assert found[1] > found[0] + 0.1
    assert content(collection) == before


def test_the_vectors_of_the_store_are_trained_against_and_not_those_of_the_model(
    data: EmbeddingQAFinetuneDataset, tmp_path: Path
) -> None:
    model = PaidEmbedding(turn=0.0)
    vectors = np.float32([model.get_text_embedding(text) for text in data.corpus.values()]) @ np.float32(turned())
    nodes = [TextNode(id_=i, text=text) for i, text in data.corpus.items()]
    with pytest.raises(WrongIndexError, match=r"32 have another vector \(median cosine"):
        engine(StoredVectors(nodes, vectors), data, tmp_path / "a", model)
    unnamed = StoredVectors([TextNode(id_=i, text="") for i in data.corpus], vectors)  # no texts to compare
    with pytest.warns(UserWarning, match="keeps no texts"):
        run = engine(unnamed, data, tmp_path / "b", model)
    result = run.finetune()
    own = evaluate_retrieval(model, run.val_dataset).metrics["ndcg@10"]
    assert result.base_metrics["ndcg@10"] < own / 2
    assert result.tuned_metrics["ndcg@10"] > result.base_metrics["ndcg@10"] + 0.1
    stored, embedded = run.smart_batching_collate([("w1", data.corpus["p3"]), ("w2", "a new passage")])[1].numpy()
    np.testing.assert_array_equal(stored, unnamed.vectors[3])
    np.testing.assert_allclose(embedded, model.get_text_embedding("a new passage"), rtol=1e-6)


def test_without_validation_data_held_out_queries_search_all_of_the_index(
    collection: Any, data: EmbeddingQAFinetuneDataset, tmp_path: Path
) -> None:
    run = engine(collection, data, tmp_path / "adapter", val_dataset=None, epochs=1)
    assert len(run.val_dataset.queries) == 12
    assert run.val_dataset.corpus == data.corpus
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run.finetune()
    assert result.evaluations[0].passages == 80


def test_what_is_wrong_with_the_index_is_named_before_training(
    collection: Any, data: EmbeddingQAFinetuneDataset, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    with pytest.raises(WrongIndexError, match="built by another model"):
        engine(collection, data, out, PaidEmbedding(length=-1.0))
    with pytest.raises(WrongIndexError, match=r"24 dimensions, and .* with 12"):
        engine(collection, data, out, PaidEmbedding(dimensions=12))
    stamp_index(collection, PaidEmbedding(model_name="other"))
    with pytest.raises(WrongIndexError, match="'other'"):
        engine(collection, data, out)
    empty = chromadb.EphemeralClient().create_collection("nothing_in_it")
    with pytest.raises(DatasetError, match="without vectors"):
        engine(empty, data, out)
    with pytest.raises(ConfigError, match="get of a Chroma collection"):
        engine(object(), data, out)
    stored = read_vectors(collection)
    with pytest.raises(DatasetError, match="NaN or infinity"):
        engine(StoredVectors(stored.nodes, np.where(stored.vectors > 0.5, np.nan, stored.vectors)), data, out)
    fewer = StoredVectors(stored.nodes[:70], stored.vectors[:70])
    with pytest.raises(DatasetError, match="10 of 20 passages of the val_dataset") as caught:
        engine(fewer, data, out)
    assert caught.value.problems == [f"p{n}" for n in range(70, 80)]
    assert not out.exists()


def test_a_stopped_run_resumes_on_the_same_vectors_and_on_no_others(
    collection: Any, data: EmbeddingQAFinetuneDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(collection, data, tmp_path / "calm", epochs=3).finetune()
    with monkeypatch.context() as patch:
        signal_in(patch, torch.optim.AdamW, "step", signal.SIGINT, 7)
        with pytest.raises(KeyboardInterrupt):
            engine(collection, data, tmp_path / "stopped", epochs=3).finetune()
    stored = read_vectors(collection)
    others = StoredVectors(stored.nodes, stored.vectors + np.float32(0.01))
    with pytest.raises(ConfigError, match="vectors: "):
        engine(others, data, tmp_path / "stopped", epochs=3, resume_from_checkpoint=True).finetune()
    engine(collection, data, tmp_path / "stopped", epochs=3, resume_from_checkpoint=True).finetune()
    calm, resumed = ((tmp_path / name / "embedding_adapter.safetensors") for name in ("calm", "stopped"))
    assert calm.read_bytes() == resumed.read_bytes()


def test_an_api_that_fails_half_way_is_paid_for_its_queries_once(
    collection: Any, data: EmbeddingQAFinetuneDataset, tmp_path: Path
) -> None:
    stamp_index(collection, PaidEmbedding())
    ledger = tmp_path / "ledger"
    with pytest.raises(ConnectionError, match="text 70"):
        engine(collection, data, tmp_path / "a", PaidEmbedding(ledger=str(ledger), fails_at=70)).finetune()
    engine(collection, data, tmp_path / "a", PaidEmbedding(ledger=str(ledger)), epochs=1).finetune()
    refused = ledger.read_text().splitlines()[69]
    known = {f"query: {_PROBE}", f"query: {PROBE}", "passage: dimensions"}
    assert set(paid_twice(ledger)) == {refused, *known}


def test_wrong_arguments_are_those_of_the_engine(
    collection: Any, data: EmbeddingQAFinetuneDataset, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="epochs"):
        engine(collection, data, tmp_path / "a", epochs=0)
    with pytest.raises(ConfigError, match="embed_model of type int"):
        engine(collection, data, tmp_path / "a", 7)
    with pytest.raises(DatasetError, match="labelled pairs"):
        EmbeddingAdapterFinetuneEngine.from_vector_store(
            collection, LabelledPairs(["a"], ["b"], [1.0]), PaidEmbedding()
        )
    with pytest.raises(ConfigError, match=f"expected {DIMENSIONS}"):
        engine(collection, data, tmp_path / "a", dim=12).finetune()
