"""/v1/evaluate: the package's metrics over HTTP."""

from __future__ import annotations

import pytest

from llama_index_lora_embed import LoraEmbedding, evaluate_retrieval
from llama_index_lora_embed.service.models import fine_tuned_model
from tests.conftest import make_dataset
from tests.helpers.service import succeeded_job

pytestmark = pytest.mark.filterwarnings("ignore")
RECALL = {f"recall_at_{k}": f"recall@{k}" for k in (1, 5, 10)}
NAMES = {"mrr": "mrr@10", "ndcg_at_10": "ndcg@10", "map": "map@100", **RECALL}


@pytest.fixture(scope="module")
def data():
    return make_dataset(passages=12, seed=3)


def body(data, **changes):
    return {"model": "tiny", "queries": data.queries, "corpus": data.corpus, "relevance": data.relevant_docs, **changes}


def evaluated(client, **request):
    answer = client.post("/v1/evaluate", json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client, **request):
    answer = client.post("/v1/evaluate", json=request)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def test_metrics_are_those_of_evaluate_retrieval_for_base_and_tuned(client, adapter, tiny_model, data):
    job = succeeded_job(client.app.state.services, adapter)
    for names, path in ((["tiny"], None), ([fine_tuned_model(job), job.id], adapter)):
        expected = evaluate_retrieval(LoraEmbedding(path, base_model=tiny_model, device="cpu"), data).metrics
        for name in names:
            answer = evaluated(client, **body(data, model=name))
            assert {key: answer[key] for key in NAMES} == pytest.approx({k: expected[m] for k, m in NAMES.items()})
            assert (answer["queries"], answer["passages"]) == (len(data.queries), len(data.corpus))


def test_lists_have_their_places_as_ids(client, data):
    rows = {passage_id: row for row, passage_id in enumerate(data.corpus)}
    lists = {
        "queries": list(data.queries.values()),
        "corpus": list(data.corpus.values()),
        "relevance": [[rows[i] for i in data.relevant_docs[q]] for q in data.queries],
    }
    by_place, by_id = evaluated(client, model="tiny", **lists), evaluated(client, **body(data))
    assert [by_place[name] for name in NAMES] == pytest.approx([by_id[name] for name in NAMES])


def test_grades_count_in_ndcg_and_0_is_irrelevant(client, data):
    other = {q: next(i for i in data.corpus if i not in ids) for q, ids in data.relevant_docs.items()}
    graded = {q: {ids[0]: 0.5, other[q]: 0} for q, ids in data.relevant_docs.items()}
    answer = evaluated(client, **body(data, relevance=graded))
    assert answer["mrr"] == pytest.approx(evaluated(client, **body(data))["mrr"])
    assert any("unjudged" in note for note in answer["notes"])


def test_beirs_forms_are_those_of_plain_texts(client, data):
    plain = evaluated(client, **body(data))
    corpus = {i: {"title": text.split()[0], "text": " ".join(text.split()[1:])} for i, text in data.corpus.items()}
    rows = [{"_id": i, "text": text} for i, text in data.queries.items()]
    judged = [{"query-id": q, "corpus-id": i, "score": 2} for q, ids in data.relevant_docs.items() for i in ids]
    nested = {q: dict.fromkeys(ids, 2) for q, ids in data.relevant_docs.items()}
    for changes in ({"corpus": corpus}, {"queries": rows}, {"relevance": judged}, {"relevance": nested}):
        answer = evaluated(client, **body(data, **changes))
        assert [answer[name] for name in NAMES] == pytest.approx([plain[name] for name in NAMES]), changes


def test_grades_above_1_are_weighed_by_the_largest(client, data):
    other = {q: next(i for i in data.corpus if i not in ids) for q, ids in data.relevant_docs.items()}
    grades = [
        {q: {ids[0]: high, other[q]: low} for q, ids in data.relevant_docs.items()} for high, low in ((1, 0.5), (4, 2))
    ]
    found = [evaluated(client, **body(data, relevance=relevance)) for relevance in grades]
    assert found[0]["ndcg_at_10"] == pytest.approx(found[1]["ndcg_at_10"])
    negative = {q: {ids[0]: 1, other[q]: -1} for q, ids in data.relevant_docs.items()}
    assert evaluated(client, **body(data, relevance=negative))["mrr"] == evaluated(client, **body(data))["mrr"]


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus": {"p0": 3}},
        {"corpus": [{"title": "w1"}]},
        {"queries": [None]},
        {"queries": [{"id": "a", "text": "w1"}] * 2},
    ],
)
def test_texts_that_are_none_or_double_are_named(client, data, changes):
    assert refused(client, **body(data, **changes))["param"] in changes


def test_wrong_ids_are_all_named(client, data):
    relevance = {**data.relevant_docs, "q0-0": ["p0", "p99"], "q77": ["p1"]}
    error = refused(client, **body(data, relevance=relevance))
    assert any("p99" in problem for problem in error["problems"])
    assert any("q77" in problem for problem in error["problems"])


@pytest.mark.parametrize("value", [None, 1.5, [["p0"]], {"p0": "high"}, {"p0": True}, [None]])
def test_relevance_that_is_none_names_the_query(client, data, value):
    error = refused(client, **body(data, relevance={**data.relevant_docs, "q1-0": value}))
    assert error["param"] == "relevance"
    assert "q1-0" in error["message"]


def test_a_query_without_relevance_and_empty_data_are_refused(client, data):
    some = {q: ids for q, ids in data.relevant_docs.items() if q != "q1-1"}
    assert "q1-1" in refused(client, **body(data, relevance=some))["message"]
    assert "0 queries" in refused(client, model="tiny", queries={}, corpus={}, relevance={})["message"]


def test_too_much_data_is_refused(client, data):
    many = {str(i): "w1" for i in range(20_000)}
    assert "at most 20000" in refused(client, **body(data, corpus=many))["message"]
