"""/v1/models over HTTP: models are listed and deleted."""

from __future__ import annotations

import pytest

from llama_index_lora_embed.service.jobs.state import ModelDeleted
from llama_index_lora_embed.service.jobs.sweep import Sweep
from llama_index_lora_embed.service.models import fine_tuned_model
from tests.helpers.service import succeeded_job


@pytest.fixture
def job(client, adapter):
    return succeeded_job(client.app.state.services, adapter)


@pytest.fixture
def tuned(job):
    return fine_tuned_model(job)


def embed(client, model):
    return client.post("/v1/embeddings", json={"model": model, "input": "w1"}).status_code


def add_version(client, model, adapter="handbook"):
    assert client.post(f"/v1/adapters/{adapter}/versions", json={"model": model}).status_code == 200
    assert client.post(f"/v1/adapters/{adapter}/promote", json={"version": "v1"}).status_code == 200


def test_models_are_listed_with_their_parents(client, tuned):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(model["id"], model["object"], model["parent"]) for model in listed["data"]] == [
        ("tiny", "model", None),
        (tuned, "model", "tiny"),
    ]
    assert client.get(f"/v1/models/{tuned}").json() == listed["data"][1]
    assert client.get("/v1/models/unknown").status_code == 404


def test_the_model_of_a_job_is_deleted_and_the_job_stays(client, job, tuned):
    settings = client.app.state.services.settings
    settings.report(job.id).write_text("a report")
    assert embed(client, tuned) == 200
    assert client.delete(f"/v1/models/{tuned}").json() == {"id": tuned, "object": "model", "deleted": True}
    assert embed(client, tuned) == embed(client, job.id) == 404
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert not (settings.models_dir / job.id).exists()
    assert not settings.report(job.id).exists()
    shown = client.get(f"/v1/fine_tuning/jobs/{job.id}").json()
    assert (shown["status"], shown["fine_tuned_model"]) == ("succeeded", None)
    (event, *_) = client.get(f"/v1/fine_tuning/jobs/{job.id}/events").json()["data"]
    assert event["message"] == "The model was deleted"
    assert client.delete(f"/v1/models/{tuned}").status_code == 404


def test_what_others_rely_on_is_not_deleted(client, job, tuned):
    add_version(client, tuned)
    for model, code in (
        (tuned, "model_in_use"),
        ("tiny", "model_not_deletable"),
        ("handbook@v1", "model_not_deletable"),
    ):
        answer = client.delete(f"/v1/models/{model}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert "handbook@v1" in client.delete(f"/v1/models/{job.id}").json()["error"]["message"]
    assert embed(client, "handbook") == embed(client, tuned) == 200


def test_an_adapter_is_deleted_with_its_versions_and_its_name_is_free_again(client, tuned):
    add_version(client, tuned)
    assert client.delete("/v1/models/handbook").status_code == 200
    assert embed(client, "handbook") == embed(client, "handbook@v1") == 404
    assert client.get("/v1/adapters").json()["data"] == []
    add_version(client, tuned)
    assert embed(client, "handbook") == 200


def test_a_model_whose_deletion_was_cut_short_is_deleted_by_the_sweep(client, job):
    services = client.app.state.services
    services.jobs.append(job.id, ModelDeleted())  # and the server dies
    assert (services.settings.models_dir / job.id).exists()
    Sweep(services).delete_old()
    assert not (services.settings.models_dir / job.id).exists()
