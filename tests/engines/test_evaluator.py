"""Evaluations of a run: what they cost, and that the figures are those of all validation data."""

import numpy as np
import pytest

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config import MiningSettings, TrainingSettings
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.engines import evaluator
from llama_index_lora_embed.engines.evaluator import StepEvaluator, evaluate_model
from llama_index_lora_embed.evaluation import evaluate_retrieval
from llama_index_lora_embed.training.lora import add_lora
from tests.conftest import make_dataset, make_engine
from tests.helpers.labelled_pairs import make_pairs
from tests.helpers.training import checkpointing_engine, stop_at, weights

SUBSET = {"selection_passages": 110}
"""Of the 150 passages of `large`, with the 154 queries about 77 of them."""


@pytest.fixture(scope="module")
def large():
    return make_dataset(passages=150, seed=7, prefix="v")


@pytest.fixture
def evaluated(monkeypatch):
    """Number of passages of each evaluation of a model."""
    sizes = []
    original = evaluator.evaluate_model

    def counting(model, dataset, **kwargs):
        sizes.append(len(dataset.texts1 if isinstance(dataset, LabelledPairs) else dataset.corpus))
        return original(model, dataset, **kwargs)

    monkeypatch.setattr(evaluator, "evaluate_model", counting)
    return sizes


def test_the_step_is_chosen_on_a_subset_and_the_figures_are_of_all_data(tiny_model, tmp_path, large, evaluated):
    engine = make_engine(tiny_model, tmp_path / "a", val_dataset=large, precision="fp32", **SUBSET)
    result = engine.finetune()
    assert evaluated == [150, 110, 110, 110, 110, 110, 150], "base, its subset, four epochs, the kept step"
    assert result.best_step > 0
    assert result.selected_on == (154, 110)
    assert result.comparison.queries == 300
    assert "chosen on 154 of these same questions" in result.summary
    assert "(chosen on 154 queries and 110 passages)" in str(result)
    base = LoraEmbedding(base_model=tiny_model, device="cpu")
    for model, metrics in ((base, result.base_metrics), (engine.get_finetuned_model(), result.tuned_metrics)):
        expected = evaluate_retrieval(model, large).metrics
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert result.history[0]["metrics"] != result.base_metrics, "steps are compared with the base on the subset"


@pytest.mark.parametrize("more", [{"selection_passages": 0}, {"selection_passages": 130}, {}])
def test_all_passages_are_used_where_they_are_wanted_or_few(tiny_model, tmp_path, large, evaluated, more):
    result = make_engine(tiny_model, tmp_path / "a", val_dataset=large, **more).finetune()
    assert evaluated == [150] * 5
    assert result.selected_on is None
    assert result.history[0]["metrics"] == result.base_metrics


def test_all_passages_are_used_where_their_vectors_are_kept(tiny_model, tmp_path, large):
    result = make_engine(tiny_model, tmp_path / "a", val_dataset=large, tune="query", **SUBSET).finetune()
    assert result.selected_on is None


def test_labelled_pairs_are_evaluated_whole(tiny_model, tmp_path, evaluated):
    pairs = make_pairs()
    make_engine(tiny_model, tmp_path / "a", pairs, val_dataset=None, val_fraction=0.3, selection_passages=1).finetune()
    assert len(set(evaluated)) == 1


@pytest.mark.slow
def test_a_run_that_compares_on_a_subset_resumes_where_it_stopped(tiny_model, tmp_path, large, monkeypatch):
    settings = {"val_dataset": large, **SUBSET}
    once = checkpointing_engine(tiny_model, tmp_path / "once", **settings).finetune()
    stop_at(monkeypatch, 7, checkpointing_engine(tiny_model, tmp_path / "twice", **settings).finetune)
    twice = checkpointing_engine(tiny_model, tmp_path / "twice", **settings, resume_from_checkpoint=True).finetune()
    assert twice.history == once.history
    assert twice.selected_on == once.selected_on
    assert (twice.base_metrics, twice.tuned_metrics) == (once.base_metrics, once.tuned_metrics)
    assert twice.comparison == once.comparison
    ours, theirs = weights(tmp_path / "twice"), weights(tmp_path / "once")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_resumed_run_may_compare_on_another_subset_if_that_is_allowed(tiny_model, tmp_path, large, monkeypatch):
    settings = {"val_dataset": large}
    stop_at(monkeypatch, 7, checkpointing_engine(tiny_model, tmp_path / "a", **settings, **SUBSET).finetune)
    again = {"resume_from_checkpoint": True, "selection_passages": 0}
    result = checkpointing_engine(
        tiny_model, tmp_path / "a", **settings, **again, allow_changes=["selection_passages"]
    ).finetune()
    assert result.selected_on is None
    assert result.history[0]["metrics"] == result.base_metrics
    assert [entry["step"] for entry in result.history] == [0, 9, 12]


@pytest.mark.slow
def test_rounds_of_mining_compare_on_one_subset(tiny_model, tmp_path, large, evaluated):
    mining = MiningSettings(num_negatives=1, rounds=2)
    result = make_engine(tiny_model, tmp_path / "a", val_dataset=large, mining=mining, epochs=2, **SUBSET).finetune()
    first = [150, 110, 110, 110, 150]
    second = [110, 110, 110, 150]  # its step 0 on the subset; on all data it was evaluated as the first round's best
    assert evaluated in (first + second, first + second[:-1])
    values = [entry["metrics"]["ndcg@10"] for entry in result.history]
    assert len(values) == 5
    assert values[3] > values[0], "the second round goes on where the first ended"


def test_an_unmerged_adapter_is_evaluated_as_it_serves(tiny_model, val_dataset, tmp_path):
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(tiny_model, device="cpu")
    add_lora(model, None, TrainingSettings())
    drawn = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=drawn)
    vectors = model.encode_document(list(val_dataset.corpus.values()), normalize_embeddings=True)
    found = evaluate_model(model, val_dataset)
    similarities = model.encode_query(list(val_dataset.queries.values()), normalize_embeddings=True) @ vectors.T
    for row, query in zip(similarities, val_dataset.queries, strict=True):
        assert np.allclose(sorted(row, reverse=True), found.similarities[query], atol=1e-5)


def test_progress_is_shown_if_wanted(tiny_model, val_dataset, capsys):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(tiny_model, device="cpu")
    for shown in (True, False):
        StepEvaluator(val_dataset, TrainingSettings(show_progress_bar=shown))(model)
        assert ("10/10" in capsys.readouterr().err) is shown
