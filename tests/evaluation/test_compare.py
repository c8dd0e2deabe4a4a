from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from llama_index_lora_embed import LabelledPairs
from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.evaluation import RetrievalEvaluation, Verdict, compare, compare_pairs
from llama_index_lora_embed.evaluation.compare import _auc_differences, _spearman_differences, describe_basis
from llama_index_lora_embed.evaluation.pairs import evaluate_pair_encoders


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


def of_kinds(scores, kinds):
    """An evaluation whose questions were made in these ways."""
    made = evaluation(scores, {kind: kinds.count(kind) for kind in set(kinds)})
    return replace(made, query_origins={f"q{i}": kind for i, kind in enumerate(kinds)})


def test_kinds_of_made_up_questions_that_disagree_are_told(base):
    kinds = ["title"] * 100 + ["inverse_cloze"] * 100
    one_sided = np.concatenate([base[:100], base[100:] + 0.1])
    text = str(compare(of_kinds(base, kinds), of_kinds(one_sided, kinds)))
    assert text.startswith("BETTER")
    assert "disagree (+0.000 on 100 made by title, +0.100 on 100 made by inverse cloze)" in text
    for quiet in (base + 0.1, base, base - 0.1):
        assert "disagree" not in str(compare(of_kinds(base, kinds), of_kinds(quiet, kinds)))
    few = ["title"] * 5 + ["inverse_cloze"] * 195
    assert "disagree" not in str(compare(of_kinds(base, few), of_kinds(one_sided, few))), "five tell nothing"
    people = ["people"] * 100 + ["title"] * 100
    assert "disagree" not in str(compare(of_kinds(base, people), of_kinds(one_sided, people)))


def pair_evaluation(similarities, labels):
    """By vectors of two dimensions whose cosine with the first axis is the similarity."""
    count = len(labels)
    pairs = LabelledPairs([f"a{i}" for i in range(count)], [f"b{i}" for i in range(count)], labels, symmetric=False)
    axes = np.tile([1.0, 0.0], (count, 1))
    turned = np.stack([similarities, np.sqrt(1 - np.square(similarities))], axis=1)
    return evaluate_pair_encoders(lambda texts: axes, lambda texts: turned, pairs)


def drawn(count=400, graded=False, signal=0.1, seed=0):
    """(labels, similarities that follow them somewhat)."""
    rng = np.random.default_rng(seed)
    labels = rng.random(count) if graded else (rng.random(count) < 0.4).astype(float)
    return labels, np.clip(0.3 + signal * labels + rng.normal(0, 0.1, count), -1, 1)


@pytest.mark.parametrize(("graded", "metric"), [(False, "roc_auc"), (True, "spearman")])
def test_verdicts_on_pairs(graded, metric):
    labels, weak = drawn(graded=graded)
    strong = weak + 0.1 * labels
    base, tuned = pair_evaluation(weak, labels), pair_evaluation(strong, labels)
    better, worse, same = compare(base, tuned), compare(tuned, base), compare(base, base)
    assert [c.verdict for c in (better, worse, same)] == [Verdict.BETTER, Verdict.WORSE, Verdict.NO_CLEAR_DIFFERENCE]
    assert better.metric == metric
    assert better.difference == pytest.approx(tuned.metrics[metric] - base.metrics[metric])
    assert better.interval[0] < better.difference < better.interval[1]
    assert better.queries == 400
    assert better.won > better.lost
    assert (worse.won, worse.lost) == (better.lost, better.won)
    assert (same.difference, same.interval, same.won, same.lost) == (0, (0, 0), 0, 0)
    assert compare_pairs(base, tuned) == better
    assert compare_pairs(base, tuned, seed=1).interval != better.interval


def test_noise_on_pairs_is_no_clear_difference():
    labels, base = drawn()
    verdicts = []
    for seed in range(10):
        noise = np.random.default_rng(seed).normal(0, 0.02, 400)
        verdicts.append(compare(pair_evaluation(base, labels), pair_evaluation(base + noise, labels)).verdict)
    assert verdicts.count(Verdict.NO_CLEAR_DIFFERENCE) >= 7


@pytest.mark.parametrize("seed", range(3))
def test_resampled_measures_are_those_of_the_pairs_drawn(seed):
    rng = np.random.default_rng(seed)
    base, tuned = (rng.integers(0, 9, 60) / 9 for _ in range(2))
    labels = rng.permutation(np.repeat([1.0, 0.0], [20, 40]))
    found = _auc_differences(base, tuned, labels == 1, np.random.default_rng(seed))
    again = np.random.default_rng(seed)
    ones, zeros = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    for difference in found[:20]:
        chosen = np.concatenate([ones[again.integers(20, size=20)], zeros[again.integers(40, size=40)]])
        expected = roc_auc_score(labels[chosen], tuned[chosen]) - roc_auc_score(labels[chosen], base[chosen])
        assert difference == pytest.approx(expected, abs=1e-12)
    grades = rng.integers(0, 6, 60) / 5
    found = _spearman_differences(base, tuned, grades, np.random.default_rng(seed))
    again = np.random.default_rng(seed)
    for difference in found[:20]:
        chosen = again.integers(60, size=60)
        expected = spearmanr(grades[chosen], tuned[chosen])[0] - spearmanr(grades[chosen], base[chosen])[0]
        assert difference == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("graded", [False, True])
def test_the_interval_over_pairs_covers_the_truth_about_as_often_as_it_says(graded):
    labels, base = drawn(20000, graded)
    rng = np.random.default_rng(3)
    tuned = np.clip(base + 0.05 * labels + rng.normal(0, 0.05, 20000), -1, 1)
    whole = [pair_evaluation(values, labels).metrics["spearman" if graded else "roc_auc"] for values in (base, tuned)]
    covered = 0
    for part in np.split(np.arange(15000), 100):
        low, high = compare(*(pair_evaluation(values[part], labels[part]) for values in (base, tuned))).interval
        covered += low <= whole[1] - whole[0] <= high
    assert 86 <= covered <= 100


def test_won_and_lost_pairs_by_hand():
    labels = [1, 1, 0, 0, 0, 0]
    base = pair_evaluation(np.array([0.9, 0.3, 0.5, 0.1, 0.2, 0.0]), labels)
    # the second 1 rises above the 0 at 0.5; the last 0 rises above the first 1
    tuned = pair_evaluation(np.array([0.9, 0.6, 0.5, 0.1, 0.2, 0.95]), labels)
    comparison = compare(base, tuned)
    assert base.metrics["roc_auc"] == pytest.approx(7 / 8)
    assert tuned.metrics["roc_auc"] == pytest.approx(6 / 8)
    # won: the 0 at 0.5; lost: the first 1 and the last 0; the second 1 gained one 0 and lost one
    assert (comparison.won, comparison.lost) == (1, 2)
    grades = [0.0, 0.25, 0.5, 1.0]
    swapped, right = (pair_evaluation(np.array(v), grades) for v in ([0.2, 0.1, 0.3, 0.9], [0.1, 0.2, 0.3, 0.4]))
    assert (compare(swapped, right).won, compare(swapped, right).lost) == (2, 0)


def test_too_few_pairs_of_a_label_are_no_verdict():
    for labels in ([1, 0], [1] * 4 + [0] * 50, [0.1 * i for i in range(9)]):
        wrong, right = -np.array(labels) / 2, np.array(labels) / 2
        comparison = compare(pair_evaluation(wrong, labels), pair_evaluation(right, labels))
        assert comparison.verdict is Verdict.NO_CLEAR_DIFFERENCE
        assert comparison.difference >= 0.99
        assert "too few to tell" in str(comparison)


def test_a_verdict_names_the_pairs_that_it_rests_on():
    labels, base = drawn()
    positive = int(labels.sum())
    text = str(compare(pair_evaluation(base, labels), pair_evaluation(base + 0.1 * labels, labels)))
    assert text.startswith("BETTER: ROC-AUC +0.")
    assert "pairs ranked better" in text
    assert f"It rests on 400 labelled pairs, {positive} positive, {400 - positive} negative." in text
    labels, base = drawn(graded=True)
    text = str(compare(pair_evaluation(base, labels), pair_evaluation(base, labels)))
    assert text.startswith("NO CLEAR DIFFERENCE: Spearman +0.000")
    assert "400 labelled pairs, 400 graded." in text


def test_a_retrieval_verdict_is_worded_as_it_was(base):
    comparison = compare(evaluation(base), evaluation(base + 0.1))
    assert comparison.metric == "ndcg@10"
    assert str(comparison) == (
        "BETTER: nDCG@10 +0.100 (95 % interval +0.100 to +0.100), 200 queries won, 0 lost of 200. "
        "It rests on 200 asked by people."
    )


def test_different_pairs_cannot_be_compared(base):
    labels, similarities = drawn()
    pairs = pair_evaluation(similarities, labels)
    with pytest.raises(DatasetError, match="different pairs"):
        compare(pairs, pair_evaluation(similarities, 1 - labels))
    with pytest.raises(DatasetError, match="different pairs"):
        compare_pairs(pairs, pair_evaluation(similarities[:-1], labels[:-1]))
    for mixed in ((pairs, evaluation(base)), (evaluation(base), pairs)):
        with pytest.raises(DatasetError, match="queries and one of labelled pairs"):
            compare(*mixed)
