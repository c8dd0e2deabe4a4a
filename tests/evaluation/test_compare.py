import numpy as np
import pytest

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.evaluation import Verdict, compare
from tests.helpers.evaluation import evaluation_with


@pytest.fixture
def base():
    return np.random.default_rng(0).uniform(0.2, 0.8, 200)


def test_a_clear_gain_is_better(base):
    comparison = compare(evaluation_with(base), evaluation_with(base + 0.1))
    assert comparison.verdict is Verdict.BETTER
    assert comparison.difference == pytest.approx(0.1)
    assert comparison.interval[0] > 0
    assert (comparison.improved, comparison.degraded) == (200, 0)


def test_a_note_is_part_of_the_basis(base):
    comparison = compare(evaluation_with(base), evaluation_with(base + 0.1), note="Half of it was trained on.")
    assert comparison.verdict is Verdict.BETTER
    assert comparison.basis == "Half of it was trained on."
    assert str(comparison).endswith(". Half of it was trained on.")


def test_a_clear_loss_is_worse(base):
    assert compare(evaluation_with(base), evaluation_with(base - 0.1)).verdict is Verdict.WORSE


def test_noise_is_no_clear_difference(base):
    noise = np.random.default_rng(1).normal(0, 0.2, 200)
    comparison = compare(evaluation_with(base), evaluation_with(base + noise - noise.mean()))
    assert comparison.verdict is Verdict.NO_CLEAR_DIFFERENCE
    assert comparison.interval[0] <= 0 <= comparison.interval[1]


def test_the_same_model_is_no_clear_difference(base):
    assert compare(evaluation_with(base), evaluation_with(base)).verdict is Verdict.NO_CLEAR_DIFFERENCE


def test_the_interval_covers_the_true_difference_about_95_percent_of_the_time():
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(100):
        base, tuned = evaluation_with(np.zeros(80)), evaluation_with(rng.normal(0.05, 0.3, 80))
        low, high = compare(base, tuned, seed=seed).interval
        covered += low <= 0.05 <= high
    assert 86 <= covered <= 100


def test_different_queries_cannot_be_compared(base):
    with pytest.raises(DatasetError, match="different queries"):
        compare(evaluation_with(base), evaluation_with(base[:-1]))
