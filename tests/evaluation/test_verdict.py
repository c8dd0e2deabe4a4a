from dataclasses import replace

import numpy as np
import pytest

from llama_index_lora_embed.evaluation import compare
from llama_index_lora_embed.evaluation.verdict import describe_queries
from tests.helpers.evaluation import evaluation_with, labels_and_similarities, pair_evaluation


@pytest.fixture
def base():
    return np.random.default_rng(0).uniform(0.2, 0.8, 200)


def test_a_verdict_names_the_queries_that_it_is_based_on(base):
    synthetic = str(compare(evaluation_with(base, {"title": 150, "inverse_cloze": 50}), evaluation_with(base + 0.1)))
    assert "Based on 150 synthetic queries (title), 50 synthetic queries (inverse cloze)." in synthetic
    assert "overstate" in synthetic
    human = describe_queries({"human": 20, "title": 5})
    assert "20 human-written queries" in human
    assert "overstate" not in human
    assert describe_queries({"unknown": 3}) == "Based on 3 queries of unknown origin."


def with_origins(scores, origins):
    evaluation = evaluation_with(scores, {origin: origins.count(origin) for origin in set(origins)})
    return replace(evaluation, query_origins={f"q{i}": origin for i, origin in enumerate(origins)})


def test_a_disagreement_between_kinds_of_synthetic_queries_is_reported(base):
    kinds = ["title"] * 100 + ["inverse_cloze"] * 100
    one_sided = np.concatenate([base[:100], base[100:] + 0.1])
    text = str(compare(with_origins(base, kinds), with_origins(one_sided, kinds)))
    assert text.startswith("BETTER")
    assert "disagree (+0.000 on 100 of title, +0.100 on 100 of inverse cloze)" in text
    for uniform in (base + 0.1, base, base - 0.1):
        assert "disagree" not in str(compare(with_origins(base, kinds), with_origins(uniform, kinds)))
    few = ["title"] * 5 + ["inverse_cloze"] * 195
    assert "disagree" not in str(compare(with_origins(base, few), with_origins(one_sided, few))), "five are too few"
    human = ["human"] * 100 + ["title"] * 100
    assert "disagree" not in str(compare(with_origins(base, human), with_origins(one_sided, human)))


def test_a_verdict_names_the_pairs_that_it_is_based_on():
    labels, base = labels_and_similarities()
    positive = int(labels.sum())
    text = str(compare(pair_evaluation(base, labels), pair_evaluation(base + 0.1 * labels, labels)))
    assert text.startswith("BETTER: ROC-AUC +0.")
    assert "pairs ranked better" in text
    assert f"Based on 400 labelled pairs ({positive} positive, {400 - positive} negative)." in text
    labels, base = labels_and_similarities(graded=True)
    text = str(compare(pair_evaluation(base, labels), pair_evaluation(base, labels)))
    assert text.startswith("NO CLEAR DIFFERENCE: Spearman +0.000")
    assert "Based on 400 labelled pairs (400 graded)." in text


def test_the_wording_of_a_retrieval_verdict(base):
    comparison = compare(evaluation_with(base), evaluation_with(base + 0.1))
    assert comparison.metric == "ndcg@10"
    assert str(comparison) == (
        "BETTER: nDCG@10 +0.100 (95 % interval +0.100 to +0.100), 200 of 200 queries improved, 0 degraded. "
        "Based on 200 human-written queries."
    )
