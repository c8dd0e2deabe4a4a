import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.evaluation import Verdict, compare, compare_pairs
from llama_index_lora_embed.evaluation.pair_comparison import resampled_differences
from tests.helpers.evaluation import evaluation_with, labels_and_similarities, pair_evaluation


@pytest.mark.parametrize(("graded", "metric"), [(False, "roc_auc"), (True, "spearman")])
def test_verdicts_on_pairs(graded, metric):
    labels, weak = labels_and_similarities(graded=graded)
    strong = weak + 0.1 * labels
    base, tuned = pair_evaluation(weak, labels), pair_evaluation(strong, labels)
    better, worse, same = compare(base, tuned), compare(tuned, base), compare(base, base)
    assert [c.verdict for c in (better, worse, same)] == [Verdict.BETTER, Verdict.WORSE, Verdict.NO_CLEAR_DIFFERENCE]
    assert better.metric == metric
    assert better.difference == pytest.approx(tuned.metrics[metric] - base.metrics[metric])
    assert better.interval[0] < better.difference < better.interval[1]
    assert better.queries == 400
    assert better.improved > better.degraded
    assert (worse.improved, worse.degraded) == (better.degraded, better.improved)
    assert (same.difference, same.interval, same.improved, same.degraded) == (0, (0, 0), 0, 0)
    assert compare_pairs(base, tuned) == better
    assert compare_pairs(base, tuned, seed=1).interval != better.interval


def test_noise_on_pairs_is_no_clear_difference():
    labels, base = labels_and_similarities()
    verdicts = []
    for seed in range(10):
        noise = np.random.default_rng(seed).normal(0, 0.02, 400)
        verdicts.append(compare(pair_evaluation(base, labels), pair_evaluation(base + noise, labels)).verdict)
    assert verdicts.count(Verdict.NO_CLEAR_DIFFERENCE) >= 7


@pytest.mark.parametrize("seed", range(3))
def test_resampled_differences_are_those_of_scikit_learn_and_scipy(seed):
    rng = np.random.default_rng(seed)
    base, tuned = (rng.integers(0, 9, 60) / 9 for _ in range(2))
    labels = rng.permutation(np.repeat([1.0, 0.0], [20, 40]))
    found = list(resampled_differences(base, tuned, labels, True, np.random.default_rng(seed)))
    again = np.random.default_rng(seed)
    ones, zeros = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    for difference in found[:20]:
        chosen = np.concatenate([ones[again.integers(20, size=20)], zeros[again.integers(40, size=40)]])
        expected = roc_auc_score(labels[chosen], tuned[chosen]) - roc_auc_score(labels[chosen], base[chosen])
        assert difference == pytest.approx(expected, abs=1e-12)
    grades = rng.integers(0, 6, 60) / 5
    found = list(resampled_differences(base, tuned, grades, False, np.random.default_rng(seed)))
    again = np.random.default_rng(seed)
    for difference in found[:20]:
        chosen = again.integers(60, size=60)
        expected = spearmanr(grades[chosen], tuned[chosen])[0] - spearmanr(grades[chosen], base[chosen])[0]
        assert difference == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("graded", [False, True])
def test_the_interval_covers_the_true_difference_about_95_percent_of_the_time(graded):
    labels, base = labels_and_similarities(20000, graded)
    rng = np.random.default_rng(3)
    tuned = np.clip(base + 0.05 * labels + rng.normal(0, 0.05, 20000), -1, 1)
    whole = [pair_evaluation(values, labels).metrics["spearman" if graded else "roc_auc"] for values in (base, tuned)]
    covered = 0
    for part in np.split(np.arange(15000), 100):
        low, high = compare(*(pair_evaluation(values[part], labels[part]) for values in (base, tuned))).interval
        covered += low <= whole[1] - whole[0] <= high
    assert 86 <= covered <= 100


def test_improved_and_degraded_pairs_by_hand():
    labels = [1, 1, 0, 0, 0, 0]
    base = pair_evaluation(np.array([0.9, 0.3, 0.5, 0.1, 0.2, 0.0]), labels)
    # the second 1 rises above the 0 at 0.5; the last 0 rises above the first 1
    tuned = pair_evaluation(np.array([0.9, 0.6, 0.5, 0.1, 0.2, 0.95]), labels)
    comparison = compare(base, tuned)
    assert base.metrics["roc_auc"] == pytest.approx(7 / 8)
    assert tuned.metrics["roc_auc"] == pytest.approx(6 / 8)
    # improved: the 0 at 0.5; degraded: the first 1 and the last 0; the second 1 passed one 0 and was passed by another
    assert (comparison.improved, comparison.degraded) == (1, 2)
    grades = [0.0, 0.25, 0.5, 1.0]
    swapped, right = (pair_evaluation(np.array(v), grades) for v in ([0.2, 0.1, 0.3, 0.9], [0.1, 0.2, 0.3, 0.4]))
    assert (compare(swapped, right).improved, compare(swapped, right).degraded) == (2, 0)


def test_there_is_no_verdict_on_too_few_pairs_of_a_label():
    for labels in ([1, 0], [1] * 4 + [0] * 50, [0.1 * i for i in range(9)]):
        wrong, right = -np.array(labels) / 2, np.array(labels) / 2
        comparison = compare(pair_evaluation(wrong, labels), pair_evaluation(right, labels))
        assert comparison.verdict is Verdict.NO_CLEAR_DIFFERENCE
        assert comparison.difference >= 0.99
        assert "A verdict needs at least 5 pairs of each label" in str(comparison)


def test_different_pairs_cannot_be_compared():
    labels, similarities = labels_and_similarities()
    pairs = pair_evaluation(similarities, labels)
    with pytest.raises(DatasetError, match="different pairs"):
        compare(pairs, pair_evaluation(similarities, 1 - labels))
    with pytest.raises(DatasetError, match="different pairs"):
        compare_pairs(pairs, pair_evaluation(similarities[:-1], labels[:-1]))
    queries = evaluation_with([0.5] * 20)
    for mixed in ((pairs, queries), (queries, pairs)):
        with pytest.raises(DatasetError, match="queries and one of labelled pairs"):
            compare(*mixed)
