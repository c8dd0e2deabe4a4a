import numpy as np
import pytest

from llama_index_lora_embed.errors import DatasetError
from llama_index_lora_embed.evaluation import RetrievalEvaluation, Verdict, compare
from llama_index_lora_embed.evaluation.compare import describe_basis


def evaluation(scores, origins=None):
    per_query = {f"q{i}": {"ndcg@10": float(score)} for i, score in enumerate(scores)}
    return RetrievalEvaluation(
        {"ndcg@10": float(np.mean(scores))}, per_query, {}, origins or {"people": len(scores)}, passages=10
    )


@pytest.fixture
def base():
    return np.random.default_rng(0).uniform(0.2, 0.8, 200)


def test_a_clear_gain_is_better(base):
    comparison = compare(evaluation(base), evaluation(base + 0.1))
    assert comparison.verdict is Verdict.BETTER
    assert comparison.difference == pytest.approx(0.1)
    assert comparison.interval[0] > 0
    assert (comparison.won, comparison.lost) == (200, 0)


def test_a_clear_loss_is_worse(base):
    assert compare(evaluation(base), evaluation(base - 0.1)).verdict is Verdict.WORSE


def test_noise_is_no_clear_difference(base):
    noise = np.random.default_rng(1).normal(0, 0.2, 200)
    comparison = compare(evaluation(base), evaluation(base + noise - noise.mean()))
    assert comparison.verdict is Verdict.NO_CLEAR_DIFFERENCE
    assert comparison.interval[0] <= 0 <= comparison.interval[1]


def test_the_same_model_is_no_clear_difference(base):
    assert compare(evaluation(base), evaluation(base)).verdict is Verdict.NO_CLEAR_DIFFERENCE


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(100):
        low, high = compare(evaluation(np.zeros(80)), evaluation(rng.normal(0.05, 0.3, 80)), seed=seed).interval
        covered += low <= 0.05 <= high
    assert 86 <= covered <= 100


def test_different_queries_cannot_be_compared(base):
    with pytest.raises(DatasetError, match="different queries"):
        compare(evaluation(base), evaluation(base[:-1]))


def test_a_verdict_names_the_questions_that_it_rests_on(base):
    made_up = str(compare(evaluation(base, {"title": 150, "inverse_cloze": 50}), evaluation(base + 0.1)))
    assert "150 made by title, 50 made by inverse cloze" in made_up
    assert "flatter" in made_up
    asked = describe_basis({"people": 20, "title": 5})
    assert "20 asked by people" in asked
    assert "flatter" not in asked
    assert "flatter" not in describe_basis({"unknown": 3})
