import html
import re

import pytest

from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset
from tests.conftest import make_dataset
from tests.helpers.service import succeeded_job

DATASET = make_dataset(20)
PASSAGES = list(DATASET.corpus.values())
QUERIES = [DATASET.queries["q3-0"], DATASET.queries["q7-1"]]


@pytest.fixture
def services(app):
    return app.state.services


@pytest.fixture
def visitor(visit):
    return visit("read", "embed")


@pytest.fixture
def job(visitor, services, adapter):
    return succeeded_job(services, adapter, services.tokens.list()[-1].id, suffix="mine")


def begun(visitor, job, **change):
    given = {"model": f"ft:tiny:mine:{job.id[6:14]}", "passages": "\n".join(PASSAGES), "queries": "\n".join(QUERIES)}
    return visitor.send("/label", {**given, **change}, "/label")


def shown(page):
    """The form's ids, the query and the passage of a page."""
    ids = dict(re.findall(r'name="(query_id|passage_id)" value="([^"]*)"', page))
    texts = re.search(r"<h1>(.*?)</h1>.*?aria-label=\"Passage\">(.*?)</div>", page, re.DOTALL)
    return ids, *(html.unescape(text) for text in texts.groups())


def grade_all(visitor, place, grade_of):
    """Answer until nothing is left; what was asked."""
    asked = []
    while "All passages are graded" not in (page := visitor.get(place)):
        ids, query, passage = shown(page)
        asked.append((query, passage))
        answer = visitor.send(f"{place}/answer", {**ids, "typed": grade_of(query, passage)}, place)
        assert answer.headers["location"] == place
    return asked


def test_grades_become_a_dataset_as_in_a_terminal(visitor, job, services, tiny_model, adapter, tmp_path):
    from llama_index.core.schema import TextNode

    from llama_index_lora_embed import LoraEmbedding
    from llama_index_lora_embed.evaluation import label_queries

    def grade_of(query, passage):
        return str(min(3, len({*query.split()} & {*passage.split()})))

    place = begun(visitor, job).headers["location"]
    asked = grade_all(visitor, place, grade_of)
    answer = visitor.client.get(f"{place}/dataset.json")
    assert answer.headers["content-disposition"] == f'attachment; filename="{place[7:]}.json"'
    (tmp_path / "page.json").write_bytes(answer.content)
    made = EmbeddingQAFinetuneDataset.from_json(tmp_path / "page.json").check()

    remembered = []
    labelled = label_queries(
        QUERIES,
        [TextNode(id_=f"p{i}", text=text) for i, text in enumerate(PASSAGES)],
        {"base": LoraEmbedding(base_model=tiny_model), "tuned": LoraEmbedding(str(adapter))},
        tmp_path / "answers.jsonl",
        ask=lambda prompt: grade_of(*remembered[-2:]),
        show=lambda text: remembered.append(re.sub(r"^\n?(Query|Passage) \d+ of \d+:\s", "", text).strip()),
    )
    assert made.digest() == labelled.dataset.digest()
    assert len(asked) == labelled.report.pooled == len(set(asked))
    assert made.origins() == {"human": 2}


def test_a_labelling_is_resumed_and_answers_are_skipped_undone_and_replaced(visitor, job, services, visit, app):
    place = begun(visitor, job).headers["location"]
    first, second = shown(visitor.get(place)), None
    visitor.send(f"{place}/answer", {**first[0], "typed": "3"}, place)
    second = shown(visitor.get(place))
    assert second[2] != first[2]
    visitor.send(f"{place}/answer", {**second[0], "typed": "s"}, place)
    third = shown(visitor.get(place))
    for expected in (second, first, first):  # the last undo has nothing left to take back
        visitor.send(f"{place}/answer", {**third[0], "typed": "u"}, place)
        assert shown(visitor.get(place)) == expected
    for typed in ("3", "0"):  # a form that is sent twice
        visitor.send(f"{place}/answer", {**first[0], "typed": typed}, place)
    assert "1 of" in visitor.get(place)
    assert shown(visitor.get(place)) == second, "the models are gone, and the labelling is not"
    assert f'href="{place}"' in visitor.get("/label")


@pytest.mark.parametrize("typed", ["4", "-1", "", "q", "33"])
def test_only_grades_are_stored(visitor, job, typed):
    place = begun(visitor, job).headers["location"]
    ids = shown(visitor.get(place))[0]
    assert visitor.send(f"{place}/answer", {**ids, "typed": typed}, place).status_code == 400
    assert visitor.send(f"{place}/answer", {"query_id": "x", "passage_id": "y", "typed": "1"}, place).status_code == 404
    assert '\n  <p class="soft">0 of' in visitor.get(place)
    answer = visitor.client.get(f"{place}/dataset.json")
    assert answer.status_code == 400
    assert "a relevant passage" in answer.text


def test_queries_and_passages_are_escaped(visitor, job):
    evil = "<script>alert(1)</script>"
    answer = begun(visitor, job, queries=evil, passages=f"{evil}\n</div>{evil}")
    page = visitor.get(answer.headers["location"])
    assert "<script>alert" not in page
    assert shown(page)[1] == evil


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"queries": ""}, "no queries"),
        ({"queries": "\n".join(map(str, range(101)))}, "101 queries"),
        ({"passages": ""}, "no passages"),
        ({"model": "tiny"}, "model"),
    ],
)
def test_a_wrong_form_is_shown_again(visitor, job, change, expected):
    answer = begun(visitor, job, **change)
    assert answer.status_code in (400, 404)
    assert expected in answer.text


def test_labellings_belong_to_a_token_and_are_deleted(visitor, visit, job, services):
    place = begun(visitor, job).headers["location"]
    stranger = visit("read", "embed")
    csrf = {"csrf": stranger.csrf("/label")}
    for path in (place, f"{place}/dataset.json", "/label/label-x", "/label/%2e%2e%2fmodels"):
        stranger.get(path, 404)
    for action in ("answer", "delete"):
        assert stranger.client.post(f"{place}/{action}", data=csrf).status_code == 404
    assert place not in stranger.get("/label")
    visitor.send(f"{place}/delete", {}, place)
    visitor.get(place, 404)
    assert list(services.settings.labelling_dir.iterdir()) == []
