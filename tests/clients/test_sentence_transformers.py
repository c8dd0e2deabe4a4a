"""sentence-transformers' own trainer, evaluators and losses on what this package writes, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine, evaluate_retrieval
from tests.conftest import make_dataset, make_engine

pytestmark = pytest.mark.extended


def pairs() -> Dataset:
    data = make_dataset()
    return Dataset.from_list(
        [{"anchor": text, "positive": data.corpus[data.relevant_docs[i][0]]} for i, text in data.queries.items()]
    )


def train_on(model: SentenceTransformer, folder: Path) -> None:
    """A few steps of sentence-transformers' trainer."""
    arguments = SentenceTransformerTrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=8, learning_rate=5e-3, report_to="none", use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs(), loss=loss).train()


def lora_weights(model: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


def test_their_evaluator_gives_the_figures_of_this_package(adapter: Path) -> None:
    data = make_dataset(passages=40, seed=3)
    relevant = {query_id: set(ids) for query_id, ids in data.relevant_docs.items()}
    evaluator = InformationRetrievalEvaluator(data.queries, data.corpus, relevant)
    theirs = evaluator(SentenceTransformer(str(adapter), device="cpu"))
    ours = evaluate_retrieval(LoraEmbedding(adapter), data).metrics
    for name, metric in {"ndcg@10": "ndcg@10", "mrr@10": "mrr@10", "hit@5": "accuracy@5"}.items():
        assert ours[name] == pytest.approx(theirs[f"cosine_{metric}"], abs=1e-6)


def test_an_adapter_of_their_trainer_is_trained_further_and_served_here(tiny_model: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = SentenceTransformer(tiny_model, device="cpu")
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    train_on(model, tmp_path / "trainer")
    model.save_pretrained(str(tmp_path / "theirs"))
    texts = list(make_dataset().corpus.values())
    expected = model.encode_document(texts)
    np.testing.assert_allclose(LoraEmbedding(tmp_path / "theirs").get_text_embedding_batch(texts), expected, atol=1e-5)
    further = make_engine(tiny_model, tmp_path / "further", continue_from=str(tmp_path / "theirs"))
    assert further.finetune().steps > 0


def test_their_trainer_trains_a_directory_of_this_package_further(adapter: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(adapter), device="cpu")
    before = lora_weights(model)
    model.set_adapter("default")  # a loaded adapter is frozen, as transformers loads it
    train_on(model, tmp_path / "trainer")
    after = lora_weights(model)
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    model.save_pretrained(str(tmp_path / "further"))
    texts = list(make_dataset().corpus.values())
    served = LoraEmbedding(tmp_path / "further").get_text_embedding_batch(texts)
    np.testing.assert_allclose(served, model.encode_document(texts), atol=1e-5)


def test_a_loss_that_was_built_on_the_engine_s_model_is_trained(tiny_model: str, tmp_path: Path) -> None:
    data = make_dataset()
    model = LoraFinetuneEngine(data, tiny_model, str(tmp_path / "unused"), device="cpu").model
    loss = losses.MultipleNegativesRankingLoss(model)
    engine = make_engine(tiny_model, tmp_path / "adapter", data, loss=loss)
    assert engine.finetune().best_step > 0
