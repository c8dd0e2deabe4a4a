import re

import pytest
from llama_index.core.schema import MetadataMode

from llama_index_lora_embed.service.data import inline_rows, read_data
from llama_index_lora_embed.service.web.passages import passages_of_job
from tests.conftest import make_dataset
from tests.helpers.service import succeeded_job

DATASET = make_dataset(40)
PASSAGES = list(DATASET.corpus.values())
QUERY = DATASET.queries["q3-0"]
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def services(app):
    return app.state.services


@pytest.fixture
def visitor(visit):
    return visit("read", "embed")


@pytest.fixture
def job(visitor, services, adapter):
    """A job of the visitor with its training data."""
    owner = services.tokens.list()[-1].id
    made = succeeded_job(services, adapter, owner, suffix="mine")
    (services.settings.jobs_dir / made.id).mkdir()
    DATASET.save_json(services.settings.jobs_dir / made.id / "training.json")
    return made


def name(job):
    return f"ft:tiny:mine:{job.id[6:14]}"


def results(page):
    """The passages of base and tuned model, with their scores."""
    sides = re.split(r"<h2>(?:Base|Tuned)</h2>", page)[1:]
    return [
        [
            (text.strip(), float(score))
            for text, score in re.findall(r"<li>([^<]*) <span class=\"soft\">([\d.-]+)", side)
        ]
        for side in sides
    ]


def test_base_and_tuned_find_what_the_package_finds(visitor, job, tiny_model, adapter):
    import numpy as np

    from llama_index_lora_embed import LoraEmbedding

    given = {"model": name(job), "passages": "\n".join(["", *PASSAGES, PASSAGES[0]]), "query": QUERY}
    page = visitor.send("/try", given, "/try")
    assert page.status_code == 200
    assert "The best of 40 passages" in page.text
    for side, model in zip(
        results(page.text), (LoraEmbedding(base_model=tiny_model), LoraEmbedding(str(adapter))), strict=True
    ):
        scores = np.array(model.get_text_embedding_batch(PASSAGES)) @ np.array(model.get_query_embedding(QUERY))
        best = np.argsort(-scores, kind="stable")[:5]
        assert [text for text, _ in side] == [PASSAGES[i] for i in best]
        assert [score for _, score in side] == pytest.approx(scores[best].tolist(), abs=1e-3)
    of_job = visitor.send("/try", {**given, "passages": "", "source": job.id}, "/try")
    assert results(of_job.text) == results(page.text)
    assert len(visitor.client.app.state.page_vectors._kept) == 2, "the same passages are embedded once"


def test_a_search_looks_the_models_up_once(visitor, job, services, monkeypatch):
    real, looked_up = services.models.cards, []
    monkeypatch.setattr(services.models, "cards", lambda owner: looked_up.append(owner) or real(owner))
    page = visitor.send("/try", {"model": name(job), "passages": "w1 w2\nw3 w4", "query": "w1"}, "/try")
    assert page.status_code == 200
    assert len(looked_up) == 2, "once for the form, once for its answer"


def test_texts_are_escaped(visitor, job):
    given = {"model": name(job), "passages": f"{EVIL}\nother", "query": f'"{EVIL}'}
    page = visitor.send("/try", given, "/try")
    assert page.status_code == 200
    assert EVIL not in page.text
    assert page.text.count("&lt;img src=x") == 4, "in both results and in both fields"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "ft:tiny:mine:00000000"}, "model"),
        ({"model": "tiny"}, "model"),
        ({"passages": "\n \n"}, "no passages"),
        ({"passages": "\n".join(map(str, range(1001)))}, "1001 passages"),
        ({"passages": "x" * 100_001}, "100001 characters"),
        ({"query": ""}, "no queries"),
        ({"source": "../../x"}, "a job of the list"),
    ],
)
def test_a_wrong_form_is_shown_again_with_what_was_typed(visitor, job, change, expected):
    given = {"model": name(job), "passages": "a\nb", "query": "the query", **change}
    answer = visitor.send("/try", given, "/try")
    assert answer.status_code in (400, 404)
    assert expected in answer.text
    assert "problem" in answer.text
    assert f'value="{given["query"]}"' in answer.text


def test_models_and_data_are_those_of_the_token(visitor, visit, job, services):
    stranger = visit("read", "embed")
    given = {"model": name(job), "passages": "a\nb", "query": "q"}
    csrf = {"csrf": stranger.csrf("/try")}
    assert name(job) not in stranger.get("/try")
    assert stranger.client.post("/try", data={**csrf, **given}).status_code == 404
    mine = succeeded_job(services, services.settings.models_dir / job.id, services.tokens.list()[-1].id)
    answer = stranger.client.post("/try", data={**csrf, **given, "model": mine.id, "source": job.id})
    assert answer.status_code in (400, 404)
    assert "without the scope" in visit("read").get("/try", 403)


def test_data_that_was_deleted_is_said(visitor, job, services):
    (services.settings.jobs_dir / job.id / "training.json").unlink()
    answer = visitor.send("/try", {"model": name(job), "source": job.id, "query": "q"}, "/try")
    assert answer.status_code == 400
    assert "deleted after its end" in answer.text


@pytest.mark.parametrize("kind", ["pairs", "nodes"])
def test_passages_are_those_of_labelled_pairs_and_of_nodes(visitor, job, services, adapter, kind):
    made = succeeded_job(services, adapter, job.spec.owner, suffix="other")
    made = made.model_copy(update={"spec": made.spec.model_copy(update={"data": kind})})
    (services.settings.jobs_dir / made.id).mkdir()
    problems = []
    rows = (
        [{"text1": "a", "text2": "b", "score": 1}, {"text1": "c", "text2": "b", "score": 0}]
        if kind == "pairs"
        else [{"text": "a", "metadata": {"title": "t"}}, {"text": "b"}]
    )
    data = read_data(inline_rows("rows", rows), services.settings, problems)
    data.write(services.settings.jobs_dir / made.id / f"training.json{'l' * (kind == 'nodes')}")
    nodes = passages_of_job(services, made)
    texts = [node.get_content(MetadataMode.EMBED) for node in nodes]
    assert texts == (["b", "a", "c"] if kind == "pairs" else ["title: t\n\na", "b"])
