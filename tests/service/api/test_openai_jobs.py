"""/v1/fine_tuning/jobs over HTTP, without training."""

from __future__ import annotations

import json

import pytest

from llama_index_lora_embed.service.jobs.state import (
    Checkpointed,
    Failed,
    JobError,
    LeaseExpired,
    Progress,
    Progressed,
    Succeeded,
)
from llama_index_lora_embed.service.models import fine_tuned_model
from tests.helpers.service import pairs_of


def upload(client, rows=None):
    lines = "".join(json.dumps(row) + "\n" for row in rows or pairs_of())
    answer = client.post("/v1/files", files={"file": ("train.jsonl", lines.encode())}, data={"purpose": "fine-tune"})
    return answer.json()["id"]


@pytest.fixture
def file_id(client):
    return upload(client)


def create(client, file_id, **body):
    answer = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client, **body):
    answer = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", **body})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def test_a_new_job_is_openais_object(client, file_id):
    job = create(
        client,
        file_id,
        suffix="handbook",
        metadata={"team": "docs"},
        validation_file=upload(client, pairs_of(6, seed=9)),
    )
    validation = job.pop("validation_file")
    assert validation.startswith("file-")
    assert job.pop("id").startswith("ftjob-")
    assert job.pop("created_at") > 1.7e9
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job == {
        "object": "fine_tuning.job",
        "finished_at": None,
        "estimated_finish": None,
        "model": "tiny",
        "fine_tuned_model": None,
        "organization_id": "local",
        "status": "queued",
        "training_file": file_id,
        "result_files": [],
        "trained_tokens": None,
        "hyperparameters": auto,
        "method": {"type": "supervised", "supervised": {"hyperparameters": auto}},
        "user_provided_suffix": "handbook",
        "seed": 42,
        "metadata": {"team": "docs"},
        "integrations": [],
        "error": None,
    }


@pytest.mark.parametrize("how", ["method", "hyperparameters"])
def test_hyperparameters_become_the_packages_arguments_in_either_place(client, services, file_id, how):
    chosen = {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 0.5}
    body = {"hyperparameters": chosen}
    if how == "method":
        body = {"method": {"type": "supervised", "supervised": {"hyperparameters": chosen}}}
    job = create(client, file_id, seed=5, **body)
    assert job["hyperparameters"] == chosen
    assert job["seed"] == 5
    arguments = services.jobs.get(job["id"]).spec.arguments
    assert arguments == {"epochs": 2, "batch_size": 16, "learning_rate": 5e-4, "seed": 5}


def test_the_two_faces_show_the_same_jobs(client, file_id):
    job = create(client, file_id, hyperparameters={"n_epochs": 2})
    own = client.get(f"/v1/finetune/{job['id']}").json()
    assert (own["status"], own["arguments"]) == ("queued", {"epochs": 2})
    other = client.post("/v1/finetune", json={"pairs": pairs_of()}).json()["job_id"]
    assert [listed["id"] for listed in client.get("/v1/fine_tuning/jobs").json()["data"]] == [other, job["id"]]
    assert client.get(f"/v1/fine_tuning/jobs/{other}").json()["training_file"] == ""


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "gpt-4o-mini"}, "model"),
        ({"training_file": "file-unknown"}, "training_file"),
        ({"validation_file": "file-unknown"}, "validation_file"),
        ({"suffix": "a:b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**40}, "seed"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"lr": 1}}, "hyperparameters.lr"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
    ],
)
def test_wrong_fields_are_named(client, file_id, body, param):
    error = refused(client, **{"training_file": file_id, **body})
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)


def test_everything_that_is_wrong_with_a_file_is_named_by_its_line(client):
    wrong = upload(client, [{"query": "w1"}, {"query": "w1", "passage": "w2"}, {"prompt": 3}])
    error = refused(client, training_file=wrong, suffix="!")
    assert len(error["problems"]) >= 3
    assert any("line 1" in problem for problem in error["problems"])
    assert any("line 3" in problem for problem in error["problems"])


def test_the_same_request_gives_the_same_job(client, file_id):
    first, again = create(client, file_id), create(client, file_id)
    other = create(client, file_id, seed=1)
    assert first["id"] == again["id"] != other["id"]


def test_jobs_are_listed_page_by_page_and_by_their_labels(client, file_id):
    ids = [create(client, file_id, seed=i, metadata={"half": str(i % 2)})["id"] for i in range(5)]
    seen, query = [], {"limit": 2}
    while True:
        page = client.get("/v1/fine_tuning/jobs", params=query).json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert seen == ids[::-1]
    half = client.get("/v1/fine_tuning/jobs", params={"metadata[half]": "0", "limit": 2}).json()
    assert ([job["id"] for job in half["data"]], half["has_more"]) == ([ids[4], ids[2]], True)
    assert client.get("/v1/fine_tuning/jobs", params={"after": "ftjob-x"}).status_code == 404


def test_pause_resume_and_cancel_change_the_status_and_what_is_not_possible_is_400(client, file_id):
    job = create(client, file_id)["id"]

    def post(action):
        return client.post(f"/v1/fine_tuning/jobs/{job}/{action}")

    assert post("pause").json()["status"] == "paused"
    assert post("resume").json()["status"] == "queued"
    cancelled = post("cancel").json()
    assert cancelled["status"] == "cancelled"
    assert cancelled["finished_at"] >= cancelled["created_at"]
    answer = post("pause")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_job_status")
    assert client.post("/v1/fine_tuning/jobs/ftjob-x/cancel").status_code == 404


@pytest.fixture
def trained(client, services, file_id):
    """A job whose first worker was lost; in the queue again, it succeeded."""
    job = create(client, file_id)["id"]
    store = services.jobs
    store.lease(job, "w", 60)
    for step in (1, 2):
        progress = Progress(step=step, total=4, loss=1 / step, learning_rate=1e-3)
        store.append(job, Progressed(attempt=1, progress=progress))
    store.append(job, Checkpointed(attempt=1, step=2))
    store.append(job, LeaseExpired(attempt=1))
    store.lease(job, "w2", 60)
    store.append(job, Checkpointed(attempt=2, step=4))
    store.append(job, Succeeded(attempt=2, result={}))
    return job


def test_events_are_messages_and_figures_newest_first_page_by_page(client, services, trained):
    address = f"/v1/fine_tuning/jobs/{trained}/events"
    seen, query = [], {"limit": 4}
    while True:
        page = client.get(address, params=query).json()
        seen += page["data"]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    name = fine_tuned_model(services.jobs.get(trained))
    assert [(event["level"], event["type"], event["message"]) for event in seen] == [
        ("info", "message", f"The job has successfully completed. New model: {name}"),
        ("info", "message", "Checkpoint created at step 4"),
        ("info", "message", "Fine-tuning job started"),
        ("warn", "message", "A worker was lost; the job goes on from its last checkpoint"),
        ("info", "message", "Checkpoint created at step 2"),
        ("info", "metrics", "Step 2/4: training loss=0.5000"),
        ("info", "metrics", "Step 1/4: training loss=1.0000"),
        ("info", "message", "Fine-tuning job started"),
        ("info", "message", f"Created fine-tuning job: {trained}"),
    ]
    assert seen[5]["data"] == {"step": 2, "total_steps": 4, "train_loss": 0.5, "learning_rate": 1e-3}
    assert {event["object"] for event in seen} == {"fine_tuning.job.event"}
    assert len({event["id"] for event in seen}) == len(seen)
    for wrong in ("ftevent-1", "ftevent-" + "9" * 24, "x", "ftevent-" + "٣" * 24):
        assert client.get(address, params={"after": wrong}).status_code == 404


def test_checkpoints_have_their_step_and_loss(client, services, trained):
    page = client.get(f"/v1/fine_tuning/jobs/{trained}/checkpoints", params={"limit": 1}).json()
    (last,) = page["data"]
    assert (last["object"], last["step_number"], page["has_more"]) == ("fine_tuning.job.checkpoint", 4, True)
    page = client.get(f"/v1/fine_tuning/jobs/{trained}/checkpoints", params={"after": last["id"]}).json()
    (first,) = page["data"]
    assert first["metrics"] == {"step": 2, "train_loss": 0.5}
    assert first["fine_tuning_job_id"] == trained
    name = fine_tuned_model(services.jobs.get(trained))
    assert first["fine_tuned_model_checkpoint"] == f"{name}:ckpt-step-2"
    assert not page["has_more"]


def test_a_failed_job_says_why(client, services, file_id):
    job = create(client, file_id)["id"]
    services.jobs.lease(job, "w", 60)
    error = JobError(code="invalid_data", message="all queries are the same")
    services.jobs.append(job, Failed(attempt=1, error=error))
    shown = client.get(f"/v1/fine_tuning/jobs/{job}").json()
    assert shown["status"] == "failed"
    assert shown["error"] == {"code": "invalid_data", "message": "all queries are the same", "param": "training_file"}
    (event, *_) = client.get(f"/v1/fine_tuning/jobs/{job}/events").json()["data"]
    assert (event["level"], event["message"]) == ("error", "The job failed: all queries are the same")
