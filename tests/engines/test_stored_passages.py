"""`from_vector_store`: queries are trained against the vectors of an index, which stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.vector_stores.chroma import ChromaVectorStore

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LabelledPairs, LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.core.errors import ConfigError, DatasetError, LoraEmbedError, WrongIndexError
from llama_index_lora_embed.data import StoredVectors, read_vectors
from llama_index_lora_embed.deployment import stamp_index, verify_index
from llama_index_lora_embed.evaluation import evaluate_index
from tests.conftest import make_dataset, make_tiny_model
from tests.helpers.llms import FakeLLM
from tests.helpers.training import stop_at, weights

SHORT: dict[str, Any] = {
    "batch_size": 8, "epochs": 4, "learning_rate": 5e-3, "show_progress_bar": False, "device": "cpu"
}  # fmt: skip


def nodes_of(data: EmbeddingQAFinetuneDataset) -> list[TextNode]:
    nodes = [TextNode(id_=i, text=text) for i, text in data.corpus.items()]
    for node in nodes:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=data.source_of(node.node_id))
    return nodes


def in_chroma(nodes: list[TextNode], model: str, folder: Path) -> Any:
    """A Chroma collection of the nodes."""
    collection = chromadb.PersistentClient(str(folder)).create_collection("passages")
    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    VectorStoreIndex(nodes, storage_context=storage, embed_model=LoraEmbedding(base_model=model, device="cpu"))
    return collection


def retriever(collection: Any, embed_model: LoraEmbedding) -> Any:
    store = ChromaVectorStore(chroma_collection=collection)
    return VectorStoreIndex.from_vector_store(store, embed_model=embed_model).as_retriever(similarity_top_k=10)


def content(collection: Any) -> dict[str, bytes]:
    """Every vector of a collection."""
    found = collection.get(include=["embeddings"])
    return {i: np.asarray(v).tobytes() for i, v in zip(found["ids"], found["embeddings"], strict=True)}


@pytest.fixture(scope="module")
def data() -> EmbeddingQAFinetuneDataset:
    return make_dataset(passages=40)


@pytest.fixture(scope="module")
def collection(data: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return in_chroma(nodes_of(data), tiny_model, tmp_path_factory.mktemp("chroma"))


def first_and_second_queries(
    data: EmbeddingQAFinetuneDataset,
) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """One query of each of the first thirty passages, and the other, without the other passages."""
    queries = list(data.queries)
    return data.subset(queries[0:60:2]), data.subset(queries[1:60:2])


def test_all_passages_of_the_store_are_negatives_and_are_searched(
    collection: Any, data: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    train, val = first_and_second_queries(data)
    engine = LoraFinetuneEngine.from_vector_store(
        collection, train, tiny_model, str(tmp_path / "a"), val_dataset=val, **SHORT
    )
    assert engine.config.training.tune == "query"
    assert isinstance(engine.dataset, EmbeddingQAFinetuneDataset)
    assert isinstance(engine.val_dataset, EmbeddingQAFinetuneDataset)
    assert engine.dataset.corpus == engine.val_dataset.corpus == data.corpus
    held_out = LoraFinetuneEngine.from_vector_store(collection, data, tiny_model, str(tmp_path / "b"), **SHORT)
    assert isinstance(held_out.dataset, EmbeddingQAFinetuneDataset)
    assert isinstance(held_out.val_dataset, EmbeddingQAFinetuneDataset)
    assert held_out.dataset.corpus == held_out.val_dataset.corpus == data.corpus
    assert len(held_out.dataset.queries) + len(held_out.val_dataset.queries) == len(data.queries)


def test_the_vectors_of_the_store_are_what_is_trained_against_and_evaluated_on(
    data: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    """The store's vectors are the model's, but turned; the stamp says that they are the model's."""
    base = LoraEmbedding(base_model=tiny_model, device="cpu")
    nodes = nodes_of(data)
    turned = -np.float32(base.get_text_embedding_batch(list(data.corpus.values())))
    store = SimpleVectorStore()
    store.add([n.model_copy(update={"embedding": v.tolist()}) for n, v in zip(nodes, turned, strict=True)])
    storage = StorageContext.from_defaults(vector_store=store)
    storage.docstore.add_documents(nodes)
    stamp_index(store, base)
    train, val = first_and_second_queries(data)
    engine = LoraFinetuneEngine.from_vector_store(
        storage, train, tiny_model, str(tmp_path / "a"), val_dataset=val, precision="fp32", negatives="corpus", **SHORT
    )
    result = engine.finetune()
    assert result.evaluations is not None
    queries = np.float32([base.get_query_embedding(q) for q in val.queries.values()])
    first = [list(data.corpus)[row] for row in (queries @ turned.T).argmax(axis=1)]
    assert [ranking[0] for ranking in result.evaluations[0].rankings.values()] == first
    assert result.tuned_metrics["ndcg@10"] > result.base_metrics["ndcg@10"]


def test_the_tuned_model_opens_the_store_and_improves_a_retriever_over_it(
    collection: Any, data: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    before = content(collection)
    train, val = first_and_second_queries(data)
    engine = LoraFinetuneEngine.from_vector_store(
        collection, train, tiny_model, str(tmp_path / "a"), val_dataset=val, precision="fp32", **SHORT
    )
    result = engine.finetune()
    tuned = engine.get_finetuned_model()
    assert isinstance(tuned, LoraEmbedding)
    base = LoraEmbedding(base_model=tiny_model, device="cpu")
    found = [evaluate_index(retriever(collection, model), val).metrics["ndcg@10"] for model in (base, tuned)]
    assert found == pytest.approx([result.base_metrics["ndcg@10"], result.tuned_metrics["ndcg@10"]], abs=1e-6)
    assert found[1] > found[0]
    assert content(collection) == before
    stamped = in_chroma(nodes_of(data), tiny_model, tmp_path / "chroma")
    stamp_index(stamped, base)
    verify_index(stamped, tuned, without_stamp="raise")


def test_without_a_dataset_queries_are_generated_from_the_nodes_of_the_store(
    nodes: list[TextNode], tiny_model: str, tmp_path: Path
) -> None:
    collection = in_chroma(nodes, tiny_model, tmp_path / "chroma")
    engine = LoraFinetuneEngine.from_vector_store(
        collection, model_id=tiny_model, model_output_path=str(tmp_path / "a")
    )
    assert isinstance(engine.dataset, EmbeddingQAFinetuneDataset)
    assert "title" in engine.dataset.origins(), "titles are in the metadata of the nodes"
    assert len(engine.dataset.corpus) == len(nodes)
    assert engine.data_report is not None


def test_an_llm_is_paid_after_the_store_was_checked_and_nothing_stored_is_embedded_again(
    nodes: list[TextNode], tiny_model: str, other_tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection, llm = in_chroma(nodes, tiny_model, tmp_path / "chroma"), FakeLLM()
    with pytest.raises(WrongIndexError):
        LoraFinetuneEngine.from_vector_store(collection, None, other_tiny_model, str(tmp_path / "a"), llm=llm)
    assert llm.calls == 0
    texts: list[str] = []
    embed = LoraEmbedding._encode

    def counted(self: LoraEmbedding, some: list[str], task: Any, **names: Any) -> Any:
        texts.extend(some if task == "document" else [])
        return embed(self, some, task, **names)

    monkeypatch.setattr("llama_index_lora_embed.deployment.index_model._SAMPLE", 3)
    monkeypatch.setattr(LoraEmbedding, "_encode", counted)
    engine = LoraFinetuneEngine.from_vector_store(collection, None, tiny_model, str(tmp_path / "a"), llm=llm)
    assert llm.calls == len(nodes)
    assert isinstance(engine.dataset, EmbeddingQAFinetuneDataset)
    assert all(origin.startswith("llm") for origin in engine.dataset.origins())
    assert len(set(texts) & set(engine.dataset.corpus.values())) == 3, "the sample that the check embeds"
    again = LoraFinetuneEngine.from_vector_store(collection, None, tiny_model, str(tmp_path / "a"), llm=llm)
    assert llm.calls == len(nodes), "the journal beside the output has all answers"
    assert again.dataset == engine.dataset


def test_a_store_without_texts_takes_those_of_the_dataset(
    data: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    base = LoraEmbedding(base_model=tiny_model, device="cpu")
    alone = VectorStoreIndex(nodes_of(data), embed_model=base).vector_store
    train, val = first_and_second_queries(data)
    with pytest.warns(UserWarning, match="keeps no texts"):
        engine = LoraFinetuneEngine.from_vector_store(
            alone, train, tiny_model, str(tmp_path / "a"), val_dataset=val, **SHORT
        )
    assert isinstance(engine.dataset, EmbeddingQAFinetuneDataset)
    assert all(engine.dataset.corpus[i] == text for i, text in train.corpus.items())
    assert len(set(engine.dataset.corpus.values())) == len(data.corpus)
    assert engine.finetune().best_step > 0
    with pytest.warns(UserWarning, match="keeps no texts"), pytest.raises(DatasetError, match="none of them with text"):
        LoraFinetuneEngine.from_vector_store(alone, None, tiny_model, str(tmp_path / "b"))


def test_passages_that_the_store_lacks_are_counted_and_named(
    collection: Any, data: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path
) -> None:
    more = make_dataset(passages=42)
    with pytest.raises(DatasetError, match=r"2 of 42 passages of the dataset .* the 40 of the store") as caught:
        LoraFinetuneEngine.from_vector_store(collection, more, tiny_model, str(tmp_path / "a"))
    assert caught.value.problems == ["p40", "p41"]
    with pytest.raises(DatasetError, match="3 of 3 passages of the val_dataset"):
        LoraFinetuneEngine.from_vector_store(
            collection, data, tiny_model, str(tmp_path / "a"), val_dataset=make_dataset(passages=3, prefix="v")
        )


def test_wrong_arguments_and_wrong_models_are_found_before_training(
    collection: Any, data: EmbeddingQAFinetuneDataset, tiny_model: str, other_tiny_model: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "a")
    with pytest.raises(ConfigError, match="tune='both' with a vector store"):
        LoraFinetuneEngine.from_vector_store(collection, data, tiny_model, out, tune="both")
    with pytest.raises(ConfigError, match="epochs"):
        LoraFinetuneEngine.from_vector_store(collection, data, tiny_model, out, epochs=-1)
    with pytest.raises(ConfigError, match='teacher of type type with tune="query"'):
        LoraFinetuneEngine.from_vector_store(collection, data, tiny_model, out, teacher=list)
    with pytest.raises(LoraEmbedError, match="labelled pairs with tune"):
        LoraFinetuneEngine.from_vector_store(collection, LabelledPairs(["a"], ["b"], [1.0]), tiny_model, out)
    with pytest.raises(WrongIndexError, match="another model than"):
        LoraFinetuneEngine.from_vector_store(collection, data, other_tiny_model, out)
    wide = make_tiny_model(tmp_path / "wide", width=64)
    with pytest.raises(WrongIndexError, match="32 dimensions"):
        LoraFinetuneEngine.from_vector_store(collection, data, str(wide), out)


@pytest.mark.slow
def test_a_killed_run_resumes_on_the_same_vectors_and_on_no_others(
    collection: Any, data: EmbeddingQAFinetuneDataset, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SHORT, "save_checkpoints": True, "checkpoint_save_steps": 2}
    train, val = first_and_second_queries(data)

    def engine(store: Any, out: str, **more: Any) -> LoraFinetuneEngine:
        return LoraFinetuneEngine.from_vector_store(
            store, train, tiny_model, str(tmp_path / out), val_dataset=val, **settings, **more
        )

    engine(collection, "whole").finetune()
    stop_at(monkeypatch, 3, engine(collection, "again").finetune)
    stored = read_vectors(collection)
    others = StoredVectors(stored.nodes, np.roll(stored.vectors, 1, axis=1) * 0.01 + stored.vectors)
    with pytest.raises(ConfigError, match="passages: "):
        engine(others, "again", resume_from_checkpoint=True).finetune()
    engine(collection, "again", resume_from_checkpoint=True).finetune()
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(expected[name].equal(found[name]) for name in expected)


@pytest.mark.slow
def test_a_retriever_over_an_untouched_collection_of_ten_thousand_passages_improves(
    tiny_model: str, tmp_path: Path
) -> None:
    data = make_dataset(passages=10_000, questions=1)
    collection = in_chroma(nodes_of(data), tiny_model, tmp_path / "chroma")
    before = content(collection)
    labelled = list(data.queries)
    train, val = data.subset(labelled[:1200]), data.subset(labelled[1200:1500])
    engine = LoraFinetuneEngine.from_vector_store(
        collection, train, tiny_model, str(tmp_path / "a"), val_dataset=val, **{**SHORT, "batch_size": 64}
    )
    result = engine.finetune()
    assert result.verdict.value == "BETTER"
    assert isinstance(engine.val_dataset, EmbeddingQAFinetuneDataset)
    assert len(engine.val_dataset.corpus) == 10_000
    base, tuned = (
        evaluate_index(retriever(collection, model), val).metrics["ndcg@10"]
        for model in (LoraEmbedding(base_model=tiny_model, device="cpu"), engine.get_finetuned_model())
    )
    assert tuned > base
    assert len(before) == 10_000
    assert content(collection) == before
