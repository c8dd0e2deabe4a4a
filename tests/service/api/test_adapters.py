"""/v1/adapters: versions of a model, and which one is in use."""

from __future__ import annotations

import pytest

from llama_index_lora_embed.service.models import fine_tuned_model
from tests.conftest import make_dataset, make_engine
from tests.helpers.adapters import distance
from tests.helpers.service import succeeded_job

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def other_adapter(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "other"
    make_engine(tiny_model, path, epochs=2, seed=5).finetune()
    return path


@pytest.fixture
def jobs(client, adapter, other_adapter):
    return [succeeded_job(client.app.state.services, path) for path in (adapter, other_adapter)]


def post(client, address, **body):
    answer = client.post(f"/v1/adapters/{address}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client, address, status=400, **body):
    answer = client.post(f"/v1/adapters/{address}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def vector(client, model):
    return client.post("/v1/embeddings", json={"model": model, "input": "w1 w2"}).json()["data"][0]["embedding"]


def test_the_name_of_an_adapter_is_the_version_that_is_promoted_or_rolled_back_to(client, jobs):
    names = [fine_tuned_model(job) for job in jobs]
    for name in names:
        post(client, "handbook/versions", model=name)
    assert client.get("/v1/adapters").json()["data"] == [
        {"id": "handbook", "object": "adapter", "in_use": None, "versions": ["v1", "v2"]}
    ]
    for version, name in (("v1", names[0]), ("v2", names[1])):
        assert post(client, "handbook/promote", version=version)["in_use"] == version
        assert distance(vector(client, "handbook"), vector(client, name)) < 1e-6
    assert post(client, "handbook/rollback")["in_use"] == "v1"
    assert distance(vector(client, "handbook"), vector(client, names[0])) < 1e-6
    assert distance(vector(client, "handbook@v2"), vector(client, names[1])) < 1e-6
    assert distance(vector(client, names[0]), vector(client, names[1])) > 1e-3
    assert post(client, "handbook/rollback")["in_use"] == "v2", "a second one undoes the first"


def test_versions_have_metrics_and_differences_on_the_data_that_they_were_evaluated_on(client, jobs):
    data = make_dataset(passages=12, seed=3)
    evaluation = {"queries": data.queries, "corpus": data.corpus, "relevance": data.relevant_docs}
    first = post(client, "handbook/versions", model=jobs[0].id, version="first", evaluation=evaluation)
    second = post(client, "handbook/versions", model=jobs[1].id, evaluation=evaluation)
    assert (first["version"], second["version"], second["base_model"]) == ("first", "v2", "tiny")
    assert "path" not in str(first)
    post(client, "handbook/promote", version="first", gate=True)
    metrics = client.get("/v1/adapters/handbook/versions/v2/metrics").json()
    assert metrics["metrics"] == second["metrics"]
    change = metrics["differences"]["ndcg@10"]
    assert change["difference"] == pytest.approx(second["metrics"]["ndcg@10"] - first["metrics"]["ndcg@10"])
    assert change["interval"][0] <= change["difference"] <= change["interval"][1]
    assert metrics["in_use"] == "first"
    answered = client.get("/v1/adapters/handbook/versions/v2").json()
    assert answered == second == client.get("/v1/adapters/handbook/versions").json()["data"][1]


def test_a_gate_refuses_a_version_that_was_not_evaluated_and_no_gate_lets_it_pass(client, jobs):
    for job in jobs:
        post(client, "handbook/versions", model=job.id)
    post(client, "handbook/promote", version="v1")
    assert "evaluated on" in refused(client, "handbook/promote", version="v2", gate=True)["message"]
    assert post(client, "handbook/promote", version="v2")["in_use"] == "v2"


def test_only_models_of_jobs_become_versions(client, jobs):
    for model in ("tiny", "unknown", "/etc"):
        assert refused(client, "handbook/versions", 404, model=model)["code"] == "model_not_found"
    assert client.get("/v1/adapters").json()["data"] == []
    assert refused(client, "handbook/versions", model=jobs[0].id, version="../v1")["param"] == "version"
    post(client, "handbook/versions", model=jobs[0].id, version="one")
    assert "taken" in refused(client, "handbook/versions", model=jobs[0].id, version="one")["message"]


@pytest.mark.parametrize("name", ["..%2f..%2fetc", "tiny", ".hidden", "a%00b", "%2e%2e", "a" * 65])
def test_names_that_are_no_names_of_adapters_are_refused(client, jobs, name):
    answer = client.post(f"/v1/adapters/{name}/versions", json={"model": jobs[0].id})
    assert answer.status_code in (400, 404, 405)
    adapters = client.app.state.services.settings.adapters_dir
    assert not adapters.exists() or list(adapters.iterdir()) == []


def test_unknown_adapters_and_versions_are_not_found(client, jobs):
    post(client, "handbook/versions", model=jobs[0].id)
    for address in ("nothing", "nothing/versions", "handbook/versions/v9", "handbook/versions/v9/metrics"):
        assert client.get(f"/v1/adapters/{address}").status_code == 404
    refused(client, "nothing/promote", 404, version="v1")
    refused(client, "handbook/promote", 404, version="v9")
