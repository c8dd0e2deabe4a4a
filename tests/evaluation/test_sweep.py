"""One half of the queries chooses a setting, the other half judges it."""

import numpy as np
import pytest

from llama_index_lora_embed.evaluation import Verdict
from llama_index_lora_embed.evaluation.sweep import Sweep
from tests.conftest import make_dataset
from tests.helpers.evaluation import evaluation_with


def sweep(dataset, scores, metric="ndcg@10"):
    """Of settings 0 (the base), 1, 2, ... with a given nDCG@10 of each query."""
    evaluations = {}
    for setting, values in enumerate(scores):
        found = evaluation_with(values)
        of_query = {
            i: {"ndcg@10": value, "hit": float(setting)} for i, value in zip(dataset.queries, values, strict=True)
        }
        origins = dict.fromkeys(dataset.queries, "human")
        evaluations[setting] = type(found)(found.metrics, of_query, {}, found.origins, 10, query_origins=origins)
    return Sweep.of(evaluations, dataset, metric, 0, abs, None)


def verdicts(settings, spread, dataset):
    """Of sweeps in which no setting differs from the base but by chance."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        noise = rng.normal(0, spread, (settings, len(dataset.queries)))
        yield sweep(dataset, [np.full(len(dataset.queries), 0.5), *(0.5 + noise)])


def test_the_best_of_many_that_differ_by_chance_is_not_better():
    dataset = make_dataset(passages=40, questions=2)
    found = list(verdicts(20, 0.1, dataset))
    assert sum(one.comparison.verdict is Verdict.BETTER for one in found) <= 3
    gains = [one.scores()[one.best] - one.scores()[0] for one in found]
    assert np.mean(gains) > 0.02, "on the queries that decided, each of them looks better"
    assert abs(np.mean([one.comparison.difference for one in found])) < 0.01


def test_a_real_gain_is_better_and_the_base_may_be_best():
    dataset = make_dataset(passages=40, questions=1)
    base = np.linspace(0.2, 0.6, 40)
    found = sweep(dataset, [base, base + 0.1, base + 0.2, base - 0.1])
    assert (found.best, found.comparison.verdict) == (2, Verdict.BETTER)
    assert len(found.chosen_on) == found.comparison.queries == 20
    assert found.scores()[2] == max(found.scores().values())
    assert "BETTER on 20 human-written queries" in str(found)
    assert "(on the 20 queries that decided)" in str(found)
    assert sweep(dataset, [base, base - 0.1]).comparison.difference == 0


def test_no_document_is_on_both_sides():
    dataset = make_dataset(passages=30, questions=3)
    found = sweep(dataset, [np.zeros(90), np.ones(90)])
    chosen = {dataset.source_of(dataset.relevant_docs[i][0]) for i in found.chosen_on}
    others = {dataset.source_of(dataset.relevant_docs[i][0]) for i in dataset.queries if i not in found.chosen_on}
    assert chosen.isdisjoint(others)
    assert len(chosen) + len(others) == 15


@pytest.mark.parametrize("passages", [2, 18])
def test_few_queries_allow_no_verdict(passages):
    dataset = make_dataset(passages=passages, questions=1)
    found = sweep(dataset, [np.zeros(passages), np.ones(passages)])
    assert (found.best, found.comparison.verdict) == (1, Verdict.NO_CLEAR_DIFFERENCE)


def test_queries_that_are_all_tied_together_choose_but_do_not_judge():
    dataset = make_dataset(passages=40, questions=1)
    dataset = dataset.model_copy(update={"source_documents": dict.fromkeys(dataset.corpus, "one document")})
    found = sweep(dataset, [np.zeros(40), np.ones(40)])
    assert (found.best, len(found.chosen_on)) == (1, 40)
    assert found.comparison.verdict is Verdict.NO_CLEAR_DIFFERENCE
    assert "chosen on these same queries, which are all tied together" in str(found)
    assert sweep(dataset, [np.ones(40), np.zeros(40)], metric="hit").comparison.verdict is Verdict.WORSE
