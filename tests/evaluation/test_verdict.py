import numpy as np
import pytest

from llama_index_lora_embed.evaluation import Evidence, Verdict, compare
from llama_index_lora_embed.evaluation.verdict import evidence_of
from tests.helpers.evaluation import evaluation_with, labels_and_similarities, pair_evaluation


@pytest.fixture
def base():
    return np.random.default_rng(0).uniform(0.2, 0.8, 200)


def compared(base, gain, origins, trained_on=None):
    return compare(evaluation_with(base, origins), evaluation_with(base + gain, origins), trained_on=trained_on)


@pytest.mark.parametrize(
    ("origin", "evidence"),
    [
        ("human", Evidence.HUMAN),
        ("llm_judged", Evidence.LOGGED),
        ("unknown", Evidence.UNKNOWN),
        ("llm", Evidence.LLM),
        ("llm/keywords", Evidence.LLM),
        ("metadata", Evidence.LLM),
        ("title", Evidence.HEURISTIC),
        ("inverse_cloze", Evidence.HEURISTIC),
        ("file_name", Evidence.HEURISTIC),
    ],
)
def test_the_evidence_that_queries_of_an_origin_are(origin, evidence):
    assert evidence_of(origin) is evidence


def test_evidence_is_ranked():
    ranks = [evidence.rank for evidence in Evidence]
    assert ranks == sorted(ranks)
    assert Evidence.HUMAN.rank < Evidence.LOGGED.rank < Evidence.LLM.rank < Evidence.HEURISTIC.rank
    assert [evidence for evidence in Evidence if evidence.real] == [Evidence.HUMAN, Evidence.LOGGED, Evidence.PAIRS]


@pytest.mark.parametrize("origin", ["human", "llm_judged"])
def test_better_without_further_words_rests_on_real_queries(base, origin):
    found = compared(base, 0.1, {origin: 200})
    assert found.verdict is Verdict.BETTER
    assert str(found).startswith(f"BETTER on 200 {evidence_of(origin).value}: nDCG@10 +0.100")
    assert compared(base, -0.1, {origin: 200}).verdict is Verdict.WORSE
    assert compared(base, 0.0, {origin: 200}).verdict is Verdict.NO_CLEAR_DIFFERENCE


def test_the_wording_of_a_retrieval_verdict(base):
    assert str(compared(base, 0.1, {"human": 200})) == (
        "BETTER on 200 human-written queries: nDCG@10 +0.100 (95 % interval +0.100 to +0.100), "
        "200 of 200 queries improved, 0 degraded."
    )


def test_a_gain_on_queries_of_unknown_origin_is_likely_and_says_how_to_record_one(base):
    found = compared(base, 0.1, {"unknown": 200})
    assert found.verdict is Verdict.LIKELY_BETTER
    assert "with_origin('human')" in str(found)
    assert compared(base, -0.1, {"unknown": 200}).verdict is Verdict.WORSE


@pytest.mark.parametrize(
    "origins",
    [{"title": 200}, {"inverse_cloze": 200}, {"title": 100, "lead": 100}, {"llm": 200}, {"llm": 100, "title": 100}],
)
def test_a_gain_on_kinds_that_were_trained_on_is_no_clear_difference_whatever_its_interval(base, origins):
    for trained_on in (None, list(origins)):
        found = compared(base, 0.15, origins, trained_on)
        assert found.verdict is Verdict.NO_CLEAR_DIFFERENCE
        assert found.interval[0] > 0.1
        assert "label_queries()" in found.basis


def test_likely_better_on_synthetic_queries_needs_headings_that_were_not_trained_on(base):
    origins = {"llm": 100, "title": 100}
    found = compared(base, 0.05, origins, ["llm"])
    assert found.verdict is Verdict.LIKELY_BETTER
    assert found.queries == 100, "the verdict rests on the headings alone"
    assert found.evidence is Evidence.HEURISTIC
    assert "not trained on (100 title)" in found.basis
    gain_on_trained_kind = np.concatenate([np.full(100, 0.2), np.zeros(100)])
    assert compared(base, gain_on_trained_kind, origins, ["llm"]).verdict is Verdict.NO_CLEAR_DIFFERENCE
    assert compared(base, 0.005, origins, ["llm"]).verdict is Verdict.NO_CLEAR_DIFFERENCE, "below the margin"
    too_few = {"llm": 180, "title": 20}
    assert compared(base, 0.05, too_few, ["llm"]).verdict is Verdict.NO_CLEAR_DIFFERENCE


def test_parts_of_passages_are_no_evidence_even_where_they_were_not_trained_on(base):
    origins = {"inverse_cloze": 100, "lead": 50, "definition": 50}
    assert compared(base, 0.2, origins, ["title"]).verdict is Verdict.NO_CLEAR_DIFFERENCE
    assert compared(base, -0.2, origins, ["title"]).verdict is Verdict.WORSE


def test_an_llm_style_that_was_kept_back_is_evidence(base):
    origins = {"llm/keywords": 100, "llm/question": 100}
    assert compared(base, 0.05, origins, ["llm/question"]).verdict is Verdict.LIKELY_BETTER
    assert compared(base, 0.05, origins, ["llm/question", "llm/keywords"]).verdict is Verdict.NO_CLEAR_DIFFERENCE


def test_a_loss_on_headings_is_worse_even_where_everything_else_gains(base):
    origins = {"title": 50, "lead": 150}
    loss = np.concatenate([np.full(50, -0.1), np.full(150, 0.2)])
    for trained_on in (None, ["lead"], ["title", "lead"]):
        found = compared(base, loss, origins, trained_on)
        assert found.verdict is Verdict.WORSE
        assert found.difference == pytest.approx(-0.1)


def test_human_written_queries_decide_over_any_number_of_synthetic_ones(base):
    gain = np.concatenate([np.full(20, -0.1), np.full(180, 0.2)])
    found = compared(base, gain, {"human": 20, "llm": 180}, ["title"])
    assert found.verdict is Verdict.WORSE
    assert (found.queries, found.evidence) == (20, Evidence.HUMAN)
    assert "180 queries of other kinds have no part in it" in found.basis


def test_a_loss_on_everything_is_worse_whatever_the_headings_say(base):
    origins = {"title": 40, "llm": 160}
    loss = np.concatenate([np.zeros(40), np.full(160, -0.2)])
    found = compared(base, loss, origins, ["llm"])
    assert found.verdict is Verdict.WORSE
    assert not found.accepts(1.0)
    both = compared(
        base,
        np.concatenate([np.full(40, -0.1), np.full(160, 0.2)]),
        {"title": 40, "llm/claim": 160},
        ["llm/question", "title"],
    )
    assert both.verdict is Verdict.WORSE, "a loss on headings that were trained on outweighs a gain on another style"


def test_unchanged_headings_do_not_make_everything_unchanged(base):
    few_lose = np.concatenate([np.zeros(40), np.tile([0.1, -0.1], 80)])
    found = compared(base, few_lose, {"title": 40, "llm": 160}, ["llm"])
    assert (found.improved, found.degraded, found.unchanged) == (0, 0, False)
    assert not found.accepts(0.5)


def test_an_unnamed_style_is_no_style_that_was_kept_back(base):
    for trained_on in (["llm"], ["metadata"], ["llm", "llm/question"]):
        assert compared(base, 0.1, {"llm/claim": 200}, trained_on).verdict is Verdict.NO_CLEAR_DIFFERENCE
    assert compared(base, 0.1, {"metadata": 200}, ["llm/question"]).verdict is Verdict.NO_CLEAR_DIFFERENCE


def test_too_few_human_written_queries_are_joined_by_the_next_best(base):
    joined = compare(
        evaluation_with(base[:18], {"human": 9, "llm_judged": 9}),
        evaluation_with(base[:18] + 0.1, {"human": 9, "llm_judged": 9}),
    )
    assert (joined.verdict, joined.queries, joined.evidence) == (Verdict.BETTER, 18, Evidence.LOGGED)
    alone = compared(base[:50], 0.1, {"human": 9, "lead": 41}, ["lead"])
    assert (alone.verdict, alone.queries, alone.evidence) == (Verdict.NO_CLEAR_DIFFERENCE, 41, Evidence.HEURISTIC)
    assert "human" not in alone.basis.partition(").")[0]


def test_fewer_than_ten_queries_allow_no_verdict(base):
    few = compare(evaluation_with(base[:9]), evaluation_with(base[:9] + 0.1))
    assert few.verdict is Verdict.NO_CLEAR_DIFFERENCE
    assert "at least 10" in few.basis
    assert few.evidence is Evidence.HUMAN
    synthetic = compare(evaluation_with(base[:9], {"lead": 9}), evaluation_with(base[:9] - 0.1, {"lead": 9}))
    assert synthetic.verdict is Verdict.NO_CLEAR_DIFFERENCE


def test_what_may_replace_the_base(base):
    assert compared(base, 0.0, {"human": 200}).accepts(0.0)
    assert not compared(base, -0.02, {"human": 200}).accepts(0.01)
    assert compared(base, -0.005, {"human": 200}).accepts(0.01)
    assert compared(base, 0.05, {"llm": 100, "title": 100}, ["llm"]).accepts(0.01)
    assert not compared(base, 0.05, {"title": 200}).accepts(0.01), "a gain on a trained kind shows nothing"
    assert compared(base, 0.0, {"title": 200}).accepts(0.0), "the same rankings are no loss"
    assert not compare(evaluation_with(base[:9]), evaluation_with(base[:9] + 0.1)).accepts(1.0)


def test_a_verdict_on_labelled_pairs():
    labels, base = labels_and_similarities()
    positive = int(labels.sum())
    text = str(compare(pair_evaluation(base, labels), pair_evaluation(base + 0.1 * labels, labels)))
    assert text.startswith("BETTER on 400 labelled pairs: ROC-AUC +0.")
    assert "pairs ranked better" in text
    assert f"They are {positive} positive, {400 - positive} negative." in text
    labels, base = labels_and_similarities(graded=True)
    text = str(compare(pair_evaluation(base, labels), pair_evaluation(base, labels)))
    assert text.startswith("NO CLEAR DIFFERENCE on 400 labelled pairs: Spearman +0.000")
    assert "They are 400 graded." in text
