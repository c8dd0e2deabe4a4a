"""`tune="query"` with a teacher: queries learn to find in an index of the base's vectors what a tuned model finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine, evaluate_retrieval
from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.core.errors import ConfigError, LoraEmbedError, ModelNotFoundError
from llama_index_lora_embed.data import StoredVectors
from llama_index_lora_embed.engines import run_finetune
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.conftest import make_dataset, make_engine
from tests.helpers.training import checkpointing_engine, stop_at, weights

QUERY: dict[str, Any] = {"tune": "query"}


@pytest.fixture(scope="module")
def teacher(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "adapter"
    make_engine(tiny_model, str(path), epochs=3).finetune()
    return path


def agreement(model: BaseEmbedding, passages: np.ndarray, teacher: LoraEmbedding, queries: list[str]) -> float:
    """Mean correlation of a model's cosines over stored vectors with those of a teacher over its own."""
    own = np.array([model.get_query_embedding(q) for q in queries]) @ passages.T
    texts = list(make_dataset().corpus.values())
    theirs = (
        np.array([teacher.get_query_embedding(q) for q in queries])
        @ np.array(teacher.get_text_embedding_batch(texts)).T
    )
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(own, theirs, strict=True)]))


def test_queries_come_closer_to_what_the_teacher_finds_and_passages_stay(
    teacher: Path, tiny_model: str, tmp_path: Path
) -> None:
    data = make_dataset()
    engine = make_engine(
        tiny_model, str(tmp_path / "a"), data, teacher=str(teacher), epochs=8, val_fraction=0.0, **QUERY
    )
    result = engine.finetune()
    base, tuned, tutor = LoraEmbedding(base_model=tiny_model), engine.get_finetuned_model(), LoraEmbedding(teacher)
    texts = list(data.corpus.values())
    stored = np.array(base.get_text_embedding_batch(texts))
    assert np.array_equal(np.array(tuned.get_text_embedding_batch(texts)), stored)
    queries = list(make_dataset(seed=9).queries.values())
    before, after = (1 - agreement(model, stored, tutor, queries) for model in (base, tuned))
    assert after < before / 2
    learnt = Manifest.read(tmp_path / "a").settings["teacher"]  # type: ignore[union-attr]
    assert learnt["name"] == "adapter"
    assert len(learnt["scores"]) == 64
    assert result.negatives is None


def test_a_store_s_vectors_are_what_is_compared_with(teacher: Path, tiny_model: str, tmp_path: Path) -> None:
    data = make_dataset()
    base = LoraEmbedding(base_model=tiny_model)
    nodes = [TextNode(id_=i, text=text) for i, text in data.corpus.items()]
    stored = StoredVectors(nodes, np.array(base.get_text_embedding_batch(list(data.corpus.values())), np.float32))
    engine = LoraFinetuneEngine.from_vector_store(
        stored, data, tiny_model, str(tmp_path / "a"), teacher=LoraEmbedding(teacher), epochs=2, device="cpu",
        show_progress_bar=False, max_seq_length=None,
    )  # fmt: skip
    result = engine.finetune()
    val = engine.val_dataset
    assert val is not None
    found = evaluate_retrieval(engine.get_finetuned_model(), val).metrics  # type: ignore[arg-type]
    assert found["ndcg@10"] == pytest.approx(result.tuned_metrics["ndcg@10"], abs=1e-3)


def test_sentences_of_the_passages_are_learnt_from_as_well(teacher: Path, tiny_model: str, tmp_path: Path) -> None:
    data = make_dataset(passages=8)
    words = " ".join(f"w{i}" for i in range(6))
    data.corpus = {i: f"{text}. {words} one. {words} two. short." for i, text in data.corpus.items()}
    arguments: dict[str, Any] = {"teacher": str(teacher), "val_fraction": 0.0, "epochs": 1, "batch_size": 4, **QUERY}
    few = make_engine(tiny_model, str(tmp_path / "few"), make_dataset(passages=8), **arguments).finetune()
    more = make_engine(tiny_model, str(tmp_path / "more"), data, **arguments).finetune()
    assert more.steps > few.steps


def test_an_interrupted_distillation_resumes_bit_for_bit_and_with_no_other_teacher(
    teacher: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"teacher": str(teacher), **QUERY}
    checkpointing_engine(tiny_model, tmp_path / "calm", **arguments).finetune()
    stop_at(monkeypatch, 5, checkpointing_engine(tiny_model, tmp_path / "run", **arguments).finetune)
    other = {**arguments, "teacher": LoraEmbedding(base_model=tiny_model)}
    with pytest.raises(LoraEmbedError, match="teacher_scores"):
        checkpointing_engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True, **other).finetune()
    checkpointing_engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True, **arguments).finetune()
    calm, resumed = weights(tmp_path / "calm"), weights(tmp_path / "run")
    assert all((calm[name] == resumed[name]).all() for name in calm)


def test_a_configuration_names_the_teacher(teacher: Path, tiny_model: str, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    make_dataset().save_json(str(data))
    config = FinetuneConfig.from_arguments(
        dataset=str(data), model_id=tiny_model, model_output_path=str(tmp_path / "a"), teacher=str(teacher), epochs=1,
        device="cpu", show_progress_bar=False, **QUERY,
    )  # fmt: skip
    assert run_finetune(config).steps > 0
    assert Manifest.read(tmp_path / "a").settings["teacher"]["name"] == "adapter"  # type: ignore[union-attr]


class Broken(LoraEmbedding):
    def _get_query_embeddings(self, queries: list[str]) -> list[list[float]]:
        return [[float("nan")] * 32 for _ in queries]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"teacher": lambda pairs: [0.0 for _ in pairs]}, "tuned on both sides"),
        ({"objective": "margin_mse"}, "expected no objective"),
        ({"teacher": "missing/folder/of/a/model"}, "model"),
    ],
    ids=["a function", "an objective", "a folder that is not there"],
)
def test_what_cannot_teach_queries_is_refused_before_anything_is_loaded(
    arguments: dict[str, Any], expected: str, teacher: Path, tiny_model: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, ModelNotFoundError), match=expected):
        make_engine(tiny_model, str(tmp_path / "a"), **{"teacher": str(teacher), **QUERY, **arguments}).finetune()
    assert not (tmp_path / "a").exists()


def test_a_teacher_with_nan_is_named(tiny_model: str, tmp_path: Path) -> None:
    engine = make_engine(tiny_model, str(tmp_path / "a"), teacher=Broken(base_model=tiny_model), **QUERY)
    with pytest.raises(ConfigError, match="teacher Broken, which returned vectors that are NaN"):
        engine.finetune()
    assert not (tmp_path / "a").exists()
