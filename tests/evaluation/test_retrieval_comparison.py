import numpy as np
import pytest
from scipy.stats import binomtest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, LoraEmbedding, compare_retrieval
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.evaluation import Verdict, compare, evaluate_retrieval
from tests.conftest import make_dataset
from tests.helpers.evaluation import WordCountEmbedding, noisy_evaluation


@pytest.fixture(scope="module")
def many():
    return make_dataset(passages=100)


@pytest.fixture(scope="module")
def both(many):
    return noisy_evaluation(2.0, many), noisy_evaluation(1.0, many)


def test_every_metric_has_its_difference_interval_and_sign_test(many, both):
    base, tuned = both
    found = compare_retrieval(base, tuned, many)
    assert found.verdict is Verdict.BETTER
    assert found.comparison == compare(base, tuned)
    assert list(found.metrics) == list(base.metrics)
    for name, metric in found.metrics.items():
        change = np.array(tuned.scores(name)) - np.array(base.scores(name))
        assert metric.difference == pytest.approx(change.mean())
        assert (metric.improved, metric.degraded) == ((change > 0).sum(), (change < 0).sum())
        assert metric.interval[0] <= metric.difference <= metric.interval[1]
        expected = binomtest(metric.improved, metric.improved + metric.degraded)
        assert metric.p_value == pytest.approx(expected.pvalue)
    assert found.metrics["ndcg@10"].interval == pytest.approx(found.comparison.interval, abs=1e-12)
    same = compare_retrieval(base, base, many)
    assert same.metrics["ndcg@10"].p_value == 1
    assert (same.verdict, same.improved, same.degraded) == (Verdict.NO_CLEAR_DIFFERENCE, [], [])
    assert compare_retrieval(tuned, base, many).verdict is Verdict.WORSE


def test_improved_and_degraded_queries_and_their_top_passages(many, both):
    base, tuned = both
    found = compare_retrieval(base, tuned, many)
    assert [q.change for q in found.improved] == sorted((q.change for q in found.improved), reverse=True)
    assert [q.change for q in found.degraded] == sorted(q.change for q in found.degraded)
    assert len(found.queries) == 200
    assert len(found.improved) == found.comparison.improved > len(found.degraded) == found.comparison.degraded > 0
    first = found.improved[0]
    assert first.text == many.queries[first.query_id]
    assert first.relevant == tuple(many.relevant_docs[first.query_id])
    assert list(first.base_top) == base.rankings[first.query_id][:5]
    assert list(first.tuned_top) == tuned.rankings[first.query_id][:5]
    assert first.relevant[0] in first.tuned_top[:1]


def test_a_regression_set_fails_at_a_loss_beyond_its_limit(many, both):
    better, worse = (
        compare_retrieval(*both, many, regression_set=both),
        compare_retrieval(*both, many, regression_set=both[::-1]),
    )
    assert better.regression_set.passed
    assert str(better).endswith("on 200 queries; accepted loss 0.020.")
    assert not worse.regression_set.passed
    assert "Regression set FAILED: nDCG@10 -0." in str(worse)
    assert worse.verdict is Verdict.BETTER, "the verdict is about the dataset"
    loss = -worse.regression_set.ndcg.difference
    for limit, passed in ((loss + 1e-6, True), (loss - 1e-6, False)):
        found = compare_retrieval(*both, many, regression_set=both[::-1], regression_limit=limit)
        assert found.regression_set.passed is passed
    for wrong in (-0.1, 2, True, "0.1"):
        with pytest.raises(ConfigError, match="regression_limit"):
            compare_retrieval(*both, many, regression_set=both, regression_limit=wrong)
    with pytest.raises(ConfigError, match="a regression_set dataset"):
        compare_retrieval(*both, many, regression_set=make_dataset())
    for wrong in ((make_dataset(), make_dataset()), (*both, both[0]), ()):
        with pytest.raises(ConfigError, match="regression_set with"):
            compare_retrieval(*both, many, regression_set=wrong)


def test_a_wrong_regression_set_is_refused_before_anything_is_embedded(many, both):
    model = WordCountEmbedding()
    smaller = make_dataset(passages=5)
    with pytest.raises(DatasetError, match="different queries"):
        compare_retrieval(model, model, many, regression_set=(both[0], noisy_evaluation(1.0, smaller)))
    assert model._calls == []


def test_names_must_be_two_different_strings(many, both):
    for wrong in (("a", "a"), ("a",), ("a", "b", "c"), ("a", 1), ("a", " ")):
        with pytest.raises(ConfigError, match="two different strings"):
            compare_retrieval(*both, many, names=wrong)


def test_models_are_evaluated_on_dataset_and_regression_set(tiny_model, adapter, tmp_path):
    dataset, general = make_dataset(passages=10, seed=7, prefix="v"), make_dataset(passages=30, seed=9)
    base, tuned = LoraEmbedding(base_model=tiny_model, device="cpu"), LoraEmbedding(adapter, device="cpu")
    found = compare_retrieval(base, tuned, dataset, regression_set=general, cache_folder=tmp_path / "vectors")
    assert found.base.metrics == evaluate_retrieval(base, dataset).metrics
    assert found.tuned.metrics == evaluate_retrieval(tuned, dataset).metrics
    assert found.regression_set.queries == 60
    assert found.regression_set.ndcg.tuned == pytest.approx(evaluate_retrieval(tuned, general).metrics["ndcg@10"])
    assert {path.name for path in (tmp_path / "vectors").iterdir()} == {base.fingerprint, tuned.fingerprint}


def test_custom_slices_are_compared_and_wrong_ones_refused(many, both):
    ids = list(many.queries)
    found = compare_retrieval(*both, many, slices={"first": ids[:50], "one": ids[:1]})
    custom = {s.name: s for s in found.slices if s.by == "custom"}
    change = [both[1].per_query[i]["ndcg@10"] - both[0].per_query[i]["ndcg@10"] for i in ids[:50]]
    assert custom["first"].queries == 50
    assert custom["first"].ndcg.difference == pytest.approx(np.mean(change))
    assert custom["one"].ndcg.interval == (-1, 1), "one query is no evidence"
    with pytest.raises(DatasetError, match="slice") as caught:
        compare_retrieval(*both, many, slices={"empty": [], "odd": ["nowhere"], "text": "no-id"})
    assert len(caught.value.problems) == 3
    as_arrays = compare_retrieval(*both, many, slices={"first": np.array(ids[:50]), "one": iter(ids[:1])})
    assert [s.queries for s in as_arrays.slices if s.by == "custom"] == [50, 1]
    assert "'empty' has no queries" in caught.value.problems[0]


def test_evaluations_of_another_dataset_are_refused(many, both):
    other = make_dataset(passages=5)
    with pytest.raises(DatasetError, match="on another dataset"):
        compare_retrieval(*both, other)
    larger = many.model_copy(update={"corpus": {**many.corpus, "more": "w1"}})
    with pytest.raises(DatasetError, match="different datasets"):
        compare(both[0], noisy_evaluation(1.0, larger))
    with pytest.raises(DatasetError, match=r"200 queries and 100 passages\).*200 queries and 101 passages"):
        compare_retrieval(*both, larger)
    with pytest.raises(DatasetError, match="with 1 problem"):
        compare_retrieval(*both, EmbeddingQAFinetuneDataset(queries={"q": "x"}, corpus={"p": "y"}, relevant_docs={}))


def test_there_is_no_verdict_on_too_few_queries():
    for count in (1, 2, 4):
        few = make_dataset(passages=count)
        found = compare_retrieval(noisy_evaluation(9.0, few), noisy_evaluation(0.01, few), few)
        assert found.verdict is Verdict.NO_CLEAR_DIFFERENCE
        assert "A verdict needs at least 10 queries." in str(found)
