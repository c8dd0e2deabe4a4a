import numpy as np
import pytest
import pytrec_eval

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.evaluation import compute_metrics
from llama_index_lora_embed.evaluation.metrics import JUDGED_NAMES, NAMES, metric_label, query_metrics


def test_metrics_of_one_ranking_by_hand():
    metrics = query_metrics(["a", "b", "c"], {"b", "z"})
    assert tuple(metrics) == NAMES
    expected = {
        **{"hit@1": 0, "hit@5": 1, "hit@10": 1, "mrr@10": 1 / 2},
        **{"ndcg@10": (1 / np.log2(3)) / (1 + 1 / np.log2(3)), "map@100": (1 / 2) / 2},
        **{"recall@1": 0, "recall@5": 1 / 2, "recall@10": 1 / 2},
        **{"precision@1": 0, "precision@5": 1 / 5, "precision@10": 1 / 10},
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_each_metric_has_its_cutoff():
    ranking = [f"p{i}" for i in range(150)]
    at = {rank: query_metrics(ranking, {f"p{rank - 1}"}) for rank in (5, 6, 10, 11, 100, 101)}
    assert (at[5]["hit@5"], at[6]["hit@5"]) == (1, 0)
    assert (at[10]["mrr@10"], at[11]["mrr@10"]) == (pytest.approx(0.1), 0)
    assert at[10]["ndcg@10"] > 0 == at[11]["ndcg@10"]
    assert at[100]["map@100"] == pytest.approx(0.01)
    assert at[101]["map@100"] == 0


def test_the_grade_is_the_gain_of_ndcg():
    found = compute_metrics({"q": ["low", "high"]}, {"q": {"low": 0.5, "high": 1.0}})["q"]
    ideal = 1 + 0.5 / np.log2(3)
    assert found["ndcg@10"] == pytest.approx((0.5 + 1 / np.log2(3)) / ideal, abs=1e-6)
    assert found["map@100"] == found["recall@5"] == 1, "any grade is relevant"
    assert compute_metrics({"q": ["x"]}, {"q": {"x": 1e-9}})["q"]["ndcg@10"] == 1, "however small"


def test_grades_of_0_are_not_relevant_and_small_grades_keep_their_order():
    assert compute_metrics({"q": ["a", "b"]}, {"q": {"a": 0, "b": 1, "c": -1}})["q"]["hit@1"] == 0
    with pytest.raises(DatasetError, match="without judgments"):
        compute_metrics({"q": ["a"]}, {"q": {"a": 0.0}})
    wrong_order = [compute_metrics({"q": ["a", "b"]}, {"q": {"a": 0.0001 * x, "b": 0.0014 * x}})["q"] for x in (1, 100)]
    assert wrong_order[0] == wrong_order[1]
    assert wrong_order[0]["ndcg@10"] < 0.7


def test_the_first_rank_of_a_repeated_passage_counts():
    assert query_metrics(["a", "b", "a"], {"a"})["mrr@10"] == 1
    assert query_metrics(["b", "b", "a"], {"a"})["mrr@10"] == pytest.approx(1 / 2)


def test_any_string_is_an_id_and_an_empty_ranking_has_metrics_of_zero():
    odd = ["", " ", "a b", "\ud800", "ü\n"]
    found = compute_metrics({"one": odd, "none": []}, {"one": {"\ud800": 1.0}, "none": {"x": 1.0}})
    assert list(found) == ["one", "none"]
    assert found["one"]["mrr@10"] == pytest.approx(1 / 4)
    assert set(found["none"].values()) == {0.0}


def test_all_queries_without_judgments_are_named():
    with pytest.raises(DatasetError, match="2 of 3 queries without judgments") as caught:
        compute_metrics({"a": ["x"], "b": ["x"], "c": ["x"]}, {"a": {"x": 1.0}, "c": {}})
    assert caught.value.problems == ["'b'", "'c'"]


def test_without_passages_judged_irrelevant_there_are_no_further_metrics():
    assert set(compute_metrics({"q": ["a", "x"]}, {"q": {"a": 1.0}})["q"]) == set(NAMES)


def test_metrics_that_leave_unjudged_passages_out_by_hand():
    ranking = ["new1", "bad1", "good1", "new2", "bad2", "good2"]
    found = compute_metrics({"q": ranking}, {"q": {"good1": 1.0, "good2": 0.5, "gone": 1.0, "bad1": 0, "bad2": 0}})["q"]
    assert set(found) == {*NAMES, *JUDGED_NAMES}
    assert found["judged@10"] == pytest.approx(4 / 6)
    # of 2 irrelevant and 3 relevant passages, 1 irrelevant is above good1 and 2 above good2
    assert found["bpref"] == pytest.approx(((1 - 1 / 2) + (1 - 2 / 2)) / 3, abs=1e-6)
    ideal = 1 + 1 / np.log2(3) + 0.5 / np.log2(4)
    assert found["condensed_ndcg@10"] == pytest.approx((1 / np.log2(3) + 0.5 / np.log2(5)) / ideal, abs=1e-6)


def test_further_metrics_are_those_of_trec_eval_and_the_others_do_not_change():
    rng = np.random.default_rng(5)
    ids = np.array([f"p{i:03}" for i in range(60)])
    rankings = {f"q{i}": rng.permutation(ids)[:40].tolist() for i in range(30)} | {"none": []}
    judged = {q: dict(zip(rng.permutation(ids)[:25].tolist(), [1, 2, 3, *[0] * 22], strict=True)) for q in rankings}
    found = compute_metrics(rankings, judged)
    relevant = {q: {i: grade for i, grade in grades.items() if grade} for q, grades in judged.items()}
    run = {q: {i: -float(rank) for rank, i in enumerate(ranking)} for q, ranking in rankings.items() if ranking}
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"bpref"}).evaluate(run)
    condensed = {q: [i for i in ranking if i in judged[q]] for q, ranking in rankings.items()}
    for q, metrics in found.items():
        assert {name: metrics[name] for name in NAMES} == compute_metrics(rankings, relevant)[q]
        alone = compute_metrics({q: condensed[q]}, relevant)[q]["ndcg@10"]
        assert metrics["condensed_ndcg@10"] == pytest.approx(alone, abs=1e-6)
        if q != "none":
            assert metrics["bpref"] == pytest.approx(theirs[q]["bpref"], abs=1e-6)
            assert metrics["judged@10"] == sum(i in judged[q] for i in rankings[q][:10]) / 10
    assert (found["none"]["bpref"], found["none"]["judged@10"]) == (0, 1)


def test_labels_of_metrics_are_written_as_in_papers():
    assert [metric_label(name) for name in JUDGED_NAMES] == ["judged@10", "bpref", "condensed nDCG@10"]
