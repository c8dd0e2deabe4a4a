"""`tune="query"`: only queries are trained, and an index of the base's vectors stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.vector_stores.chroma import ChromaVectorStore
from safetensors.torch import load_file

from llama_index_lora_embed import (
    EmbeddingQAFinetuneDataset,
    LabelledPairs,
    LoraEmbedding,
    LoraEmbedError,
    LoraFinetuneEngine,
    evaluate_retrieval,
)
from llama_index_lora_embed.config import MiningSettings, ObjectiveSettings
from llama_index_lora_embed.core.errors import AdapterError, ConfigError, WrongIndexError
from llama_index_lora_embed.deployment import merge_adapters, stamp_index, verify_index
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.conftest import make_dataset, make_engine
from tests.helpers.training import checkpointing_engine, stop_at, weights

QUERY: dict[str, Any] = {"tune": "query"}


@pytest.fixture(scope="module")
def query_adapter(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for queries that gained on its validation data."""
    path = tmp_path_factory.mktemp("query") / "adapter"
    result = make_engine(tiny_model, str(path), **QUERY).finetune()
    assert result.best_step > 0, "the fixture must have learnt something"
    return path


def matrix(vectors: list[list[float]]) -> np.ndarray:
    return np.array(vectors, dtype=np.float32)


def test_queries_change_and_passages_keep_the_vectors_of_the_base(query_adapter: Path, tiny_model: str) -> None:
    tuned, base = LoraEmbedding(query_adapter), LoraEmbedding(base_model=tiny_model)
    data = make_dataset()
    texts, queries = list(data.corpus.values()), list(data.queries.values())
    assert tuned.get_text_embedding_batch(texts) == base.get_text_embedding_batch(texts)
    assert not np.allclose(
        matrix([tuned.get_query_embedding(q) for q in queries]),
        matrix([base.get_query_embedding(q) for q in queries]),
        atol=1e-3,
    )


def test_the_result_has_the_figures_of_the_written_model(tiny_model: str, tmp_path: Path) -> None:
    data, val = make_dataset(), make_dataset(passages=10, seed=5, prefix="v")
    engine = make_engine(tiny_model, str(tmp_path / "a"), data, val_dataset=val, precision="fp32", **QUERY)
    result = engine.finetune()
    found = evaluate_retrieval(engine.get_finetuned_model(), val).metrics
    assert found["ndcg@10"] == pytest.approx(result.tuned_metrics["ndcg@10"], abs=1e-6)


def test_it_opens_the_index_of_its_base_and_no_other(
    query_adapter: Path, adapter: Path, tiny_model: str, other_tiny_model: str, nodes: list[TextNode]
) -> None:
    base, tuned = LoraEmbedding(base_model=tiny_model), LoraEmbedding(query_adapter)
    assert tuned.passage_fingerprint == base.fingerprint
    assert tuned.fingerprint != base.fingerprint
    index = VectorStoreIndex(nodes, embed_model=base)
    stamp_index(index, base)
    verify_index(index, tuned, without_stamp="raise")
    for builder in (LoraEmbedding(adapter), LoraEmbedding(base_model=other_tiny_model)):
        other = VectorStoreIndex(nodes, embed_model=builder)
        stamp_index(other, builder)
        with pytest.raises(WrongIndexError):
            verify_index(other, tuned)


def test_an_index_with_a_pooling_and_a_passage_prompt_of_its_own_keeps_them_without_a_gain(
    tiny_model: str, tmp_path: Path
) -> None:
    reading: dict[str, Any] = {"pooling": "cls", "passage_prompt": "passage: "}
    settings: dict[str, Any] = {"learning_rate": 1e-12, "epochs": 1, **reading, **QUERY}
    result = make_engine(tiny_model, str(tmp_path / "a"), **settings).finetune()
    assert (result.best_step, result.base_change) == (0, None)
    base = LoraEmbedding(base_model=tiny_model, **reading)
    assert LoraEmbedding(tmp_path / "a").passage_fingerprint == base.fingerprint


def test_a_chroma_collection_is_byte_for_byte_the_same_after_training_and_retrieval(
    tiny_model: str, tmp_path: Path
) -> None:
    data = make_dataset()
    collection = chromadb.PersistentClient(str(tmp_path / "chroma")).create_collection("passages")
    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    nodes = [TextNode(id_=i, text=text) for i, text in data.corpus.items()]
    VectorStoreIndex(nodes, storage_context=storage, embed_model=LoraEmbedding(base_model=tiny_model))

    def stored() -> dict[str, bytes]:
        found = collection.get(include=["embeddings"])
        assert found["embeddings"] is not None
        return {i: np.asarray(v).tobytes() for i, v in zip(found["ids"], found["embeddings"], strict=True)}

    before = stored()
    engine = make_engine(tiny_model, str(tmp_path / "adapter"), data, **QUERY)
    engine.finetune()
    tuned = VectorStoreIndex.from_vector_store(storage.vector_store, embed_model=engine.get_finetuned_model())
    assert tuned.as_retriever(similarity_top_k=3).retrieve("anything")
    assert len(before) == len(nodes)
    assert stored() == before


def test_in_a_pool_each_tenant_has_its_query_side_on_the_base_s_passages(query_adapter: Path, adapter: Path) -> None:
    pool = LoraEmbedding(adapters={"query": query_adapter, "both": adapter}, adapter="query")
    alone = LoraEmbedding(query_adapter)
    assert (pool.fingerprint, pool.passage_fingerprint) == (alone.fingerprint, alone.passage_fingerprint)
    texts = ["one passage", "another passage that is longer"]
    np.testing.assert_allclose(pool.get_text_embedding_batch(texts), alone.get_text_embedding_batch(texts), atol=1e-5)
    np.testing.assert_allclose(pool.get_query_embedding("a query"), alone.get_query_embedding("a query"), atol=1e-5)
    mixed = pool.get_mixed_embeddings(texts, ["query", "both"])
    np.testing.assert_allclose(mixed[0], pool.with_adapter(None).get_text_embedding(texts[0]), atol=1e-5)
    np.testing.assert_allclose(mixed[1], pool.with_adapter("both").get_text_embedding(texts[1]), atol=1e-5)


def test_a_killed_run_continues_to_the_same_weights(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = checkpointing_engine(tiny_model, str(tmp_path / "whole"), **QUERY)
    whole.finetune()
    again = str(tmp_path / "again")
    stop_at(monkeypatch, 2, checkpointing_engine(tiny_model, again, **QUERY).finetune)
    checkpointing_engine(tiny_model, again, resume_from_checkpoint=True, **QUERY).finetune()
    expected, found = weights(tmp_path / "whole"), weights(again)
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


def test_the_same_seed_gives_the_same_adapter(tiny_model: str, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_engine(tiny_model, str(tmp_path / name), seed=seed, **{**QUERY, "epochs": 1}).finetune()
        found.append(weights(tmp_path / name))
    assert all(found[0][name].equal(found[1][name]) for name in found[0])
    assert not all(found[0][name].equal(found[2][name]) for name in found[0])


def test_the_side_is_recorded_and_a_continued_adapter_keeps_it(
    query_adapter: Path, tiny_model: str, tmp_path: Path
) -> None:
    manifest = Manifest.read(query_adapter)
    assert manifest is not None
    assert (manifest.tune, manifest.settings["tune"]) == ("query", "query")
    assert "for queries alone" in (query_adapter / "README.md").read_text()
    with pytest.raises(ConfigError, match="tune='both' with continue_from"):
        make_engine(tiny_model, str(tmp_path / "a"), continue_from=str(query_adapter)).finetune()
    further = make_engine(tiny_model, str(tmp_path / "b"), continue_from=str(query_adapter), **QUERY)
    further.finetune()
    texts = list(make_dataset().corpus.values())
    base = LoraEmbedding(base_model=tiny_model)
    assert further.get_finetuned_model().get_text_embedding_batch(texts) == base.get_text_embedding_batch(texts)


def test_what_cannot_be_trained_on_queries_alone_is_named_at_once(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraFinetuneEngine(
            make_dataset(), tiny_model, str(tmp_path / "a"), mining=MiningSettings(), max_seq_length=32, window=16,
            objective=ObjectiveSettings(guide=True, matryoshka_dims=(8,)), **QUERY,
        )  # fmt: skip
    text = "\n".join(caught.value.problems)
    for name in ("mining", "max_seq_length", "window", "guide=True", "matryoshka_dims"):
        assert f'{name} with tune="query"' in text
    pairs = LabelledPairs(["a question", "b question"], ["a passage", "b passage"], [1.0, 0.0])
    with pytest.raises(LoraEmbedError, match="labelled pairs with tune"):
        LoraFinetuneEngine(pairs, tiny_model, str(tmp_path / "a"), **QUERY)


def test_negatives_are_chosen_on_folds_and_the_result_says_which(tiny_model: str, tmp_path: Path) -> None:
    data = make_dataset()
    part = data.subset(list(data.queries)[:40], data.corpus)  # four of the passages are asked for by nobody
    results = {
        negatives: make_engine(tiny_model, str(tmp_path / negatives), part, epochs=1, negatives=negatives, **QUERY)
        for negatives in ("auto", "corpus", "answered")
    }
    found = {name: engine.finetune().negatives for name, engine in results.items()}
    assert found == {"auto": found["auto"], "corpus": "corpus", "answered": "answered"}
    trained = {name: weights(tmp_path / name) for name in found}
    same = {
        name
        for name in ("corpus", "answered")
        if all(trained[name][k].equal(trained["auto"][k]) for k in trained[name])
    }
    assert same == {found["auto"]}
    manifest = Manifest.read(tmp_path / "auto")
    assert manifest is not None
    assert manifest.settings["negatives"] == found["auto"]


def test_negatives_belong_to_tuning_queries_alone(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_engine(tiny_model, str(tmp_path / "a"), negatives="answered")
    assert "negatives='answered' with tune='both'" in "\n".join(caught.value.problems)


def test_two_query_adapters_merge_and_one_of_each_kind_does_not(
    query_adapter: Path, adapter: Path, tiny_model: str, tmp_path: Path
) -> None:
    merge_adapters([query_adapter, query_adapter], tmp_path / "merged")
    merged = LoraEmbedding(tmp_path / "merged")
    assert merged.passage_fingerprint == LoraEmbedding(base_model=tiny_model).fingerprint
    np.testing.assert_allclose(
        merged.get_query_embedding("a query"), LoraEmbedding(query_adapter).get_query_embedding("a query"), atol=1e-5
    )
    with pytest.raises(ConfigError, match="different settings"):
        merge_adapters([query_adapter, adapter], tmp_path / "mixed")


def test_an_export_of_one_side_is_refused(query_adapter: Path, tmp_path: Path) -> None:
    texts = [f"passage number {i}" for i in range(30)]
    with pytest.raises(ConfigError, match="queries and passages have different weights"):
        LoraEmbedding(query_adapter).export(tmp_path / "export", texts=texts)


def test_graded_passages_and_shortened_passages_are_trained_on(tiny_model: str, tmp_path: Path) -> None:
    data = make_dataset()
    first, *others = data.queries
    ids = list(data.corpus)
    graded = EmbeddingQAFinetuneDataset(
        queries=data.queries,
        corpus=data.corpus,
        relevant_docs={**data.relevant_docs, first: [*data.relevant_docs[first], ids[-1]]},
        relevance_scores={first: {data.relevant_docs[first][0]: 0.5, ids[-1]: 1.0}},
        training_passages={others[0]: "the passage without its title"},
    )
    make_engine(tiny_model, str(tmp_path / "a"), graded, val_fraction=0, **QUERY).finetune()
    trained = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in trained.items() if "lora_B" in name)


def test_vectors_of_a_base_that_is_not_the_adapter_s_are_refused(query_adapter: Path, other_tiny_model: str) -> None:
    with pytest.raises((AdapterError, LoraEmbedError)):
        LoraEmbedding(query_adapter, base_model=other_tiny_model).get_text_embedding("a passage")
