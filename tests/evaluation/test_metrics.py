import numpy as np
import pytest

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.evaluation import compute_metrics
from llama_index_lora_embed.evaluation.metrics import NAMES, query_metrics


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
