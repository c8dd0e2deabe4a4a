import json
import os
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_index_lora_embed.service.api.finetune import FinetuneRequest
from llama_index_lora_embed.service.jobs.order import ALLOWED_ARGUMENTS
from llama_index_lora_embed.service.jobs.state import Failed, JobError, Progress, Progressed, Stopped, Succeeded
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.helpers.service import job_request, sse_events


@pytest.fixture
def services(client):
    return client.app.state.services


@pytest.fixture
def job_id(client):
    answer = client.post("/v1/finetune", json=job_request())
    assert answer.status_code == 200, answer.text
    return answer.json()["job_id"]


def test_a_job_is_created_listed_and_shown(client, services, job_id):
    job = client.get(f"/v1/finetune/{job_id}").json()
    assert (job["job_id"], job["status"], job["model"], job["fine_tuned_model"]) == (job_id, "queued", "tiny", None)
    assert job["arguments"] == {"epochs": 3, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32"}
    assert client.get("/v1/finetune").json() == {"data": [job], "has_more": False}
    assert client.get("/v1/finetune?status=running").json()["data"] == []
    assert services.queue.take(0) == job_id
    assert os.listdir(services.settings.jobs_dir / job_id) == ["training.json"]


def test_a_job_takes_triplets_nodes_and_an_uploaded_file(client, services):
    triplets = [["q", "p", "n", 0.5], ["r", "s", ["m", "o"]]]
    nodes = [{"text": f"Title {i}. Some words about {i}."} for i in range(6)]
    row = services.files.add([b'{"query": "q", "passage": "p"}\n'], "train.jsonl", owner="local")
    for body, kind in (
        ({"triplets": triplets}, "queries"),
        ({"nodes": nodes}, "nodes"),
        ({"training_file": row.id}, "queries"),
    ):
        answer = client.post("/v1/finetune", json={**body, "suffix": "mine", "metadata": {"team": "a"}})
        assert answer.status_code == 200, answer.text
        job = services.jobs.get(answer.json()["job_id"])
        assert (job.spec.data, job.spec.suffix, job.spec.metadata) == (kind, "mine", {"team": "a"})


def test_everything_that_is_wrong_with_a_request_is_answered_at_once(client, services):
    body = job_request(
        pairs=[["q", ""]],
        validation_file="file-none",
        model="/etc",
        suffix="../x",
        epochs=0,
        model_output_path="/tmp/x",
        dataset="/etc/passwd",
        trust_remote_code=True,
        mining={"memory_mb": 1e9},
    )
    answer = client.post("/v1/finetune", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    named = [problem.partition(":")[0].partition("=")[0] for problem in error["problems"]]
    assert sorted(named) == sorted([
        *("validation_file", "model", "suffix", "dataset", "model_output_path", "trust_remote_code"),
        *("mining.memory_mb", "epochs", "pairs[0]"),
    ])  # fmt: skip
    assert os.listdir(services.settings.jobs_dir) == []
    assert client.get("/v1/finetune").json()["data"] == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({}, "no training data"),
        ({"pairs": [["q", "p"]], "nodes": ["t"]}, "pairs and nodes together"),
        ({"pairs": [["q", "p", 1], ["r", "s", 0]], "objective": "triplet"}, "labelled pairs"),
        ({"pairs": [["q", "p"]], "validation_pairs": [["q", "p", 0.5]]}, "validation data of the kind 'pairs'"),
        ({"pairs": [["q", "p"]], "best_metric": "beauty"}, "beauty"),
        ({"pairs": "text"}, "pairs: Input should be a valid list"),
        ({"pairs": [["q", "p"]], "metadata": {"a": "x" * 600}}, "metadata"),
    ],
)
def test_a_request_that_cannot_be_trained_is_refused(client, body, problem):
    answer = client.post("/v1/finetune", json=body)
    assert answer.status_code == 400
    assert problem in answer.json()["error"]["message"]


def test_the_same_request_twice_gives_one_job(client, job_id):
    assert client.post("/v1/finetune", json=job_request()).json()["job_id"] == job_id
    assert client.post("/v1/finetune", json=job_request(seed=1)).json()["job_id"] != job_id
    client.delete(f"/v1/finetune/{job_id}")
    assert client.post("/v1/finetune", json=job_request()).json()["job_id"] != job_id


def test_a_job_is_paused_resumed_and_cancelled(client, services, job_id):
    url = f"/v1/finetune/{job_id}"
    assert client.post(f"{url}/pause").json()["status"] == "paused"
    assert client.post(f"{url}/resume").json()["status"] == "queued"
    services.jobs.lease(job_id, "w", 60)
    assert client.delete(url).json()["status"] == "cancelling"
    answer = client.post(f"{url}/resume")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_job_status")
    services.apply(job_id, Stopped(attempt=1))
    assert client.get(url).json()["status"] == "cancelled"
    assert client.delete(url).json()["status"] == "cancelled", "a repeated request changes nothing"


@pytest.mark.parametrize("method", ["get", "delete"])
@pytest.mark.parametrize("job", ["ftjob-none", "..%2f..%2fetc", "%00", "x" * 5000])
def test_an_unknown_job_is_not_found(client, method, job):
    answer = getattr(client, method)(f"/v1/finetune/{job}")
    assert answer.status_code == 404
    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


def test_a_stream_replays_events_and_ends_with_the_job(client, services, job_id):
    services.jobs.lease(job_id, "w", 60)
    services.apply(job_id, Progressed(attempt=1, progress=Progress(step=3, total=9, loss=0.5, learning_rate=1e-3)))
    services.apply(job_id, Succeeded(attempt=1, result={"verdict": "BETTER", "metrics": {"tuned": {"mrr@10": 1.0}}}))
    answer = client.get(f"/v1/finetune/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.count("retry: 2000") == 1
    events = sse_events(answer.text)
    assert [event["event"] for event in events] == ["heartbeat", "progress", "progress", "progress", "complete"]
    assert [event["id"] for event in events[1:]] == ["1", "2", "3", "4"]
    shown = events[3]["data"]
    assert (shown["step"], shown["total"], shown["loss"], shown["learning_rate"]) == (3, 9, 0.5, 1e-3)
    assert events[4]["data"]["result"]["verdict"] == "BETTER"
    later = sse_events(client.get(f"/v1/finetune/{job_id}/events", headers={"Last-Event-ID": "3"}).text)
    assert [event["event"] for event in later] == ["heartbeat", "complete"]
    job = client.get(f"/v1/finetune/{job_id}").json()
    assert (job["verdict"], job["metrics"]["loss"], job["metrics"]["tuned"]) == ("BETTER", 0.5, {"mrr@10": 1.0})
    assert job["fine_tuned_model"] == f"ft:tiny::{job_id[6:14]}"


def test_a_stream_of_a_job_that_fails_ends_with_an_error(client, services, job_id):
    services.jobs.lease(job_id, "w", 60)
    services.apply(job_id, Failed(attempt=1, error=JobError(code="disk_full", message="The disk is full.")))
    last = sse_events(client.get(f"/v1/finetune/{job_id}/events").text)[-1]
    assert (last["event"], last["data"]["error"]["code"]) == ("error", "disk_full")


def test_a_stream_waits_for_news_and_ends_when_the_server_stops(client, services, job_id):
    def work():
        time.sleep(0.7)
        services.jobs.lease(job_id, "w", 60)
        time.sleep(0.7)
        client.app.state.stopping.set()

    thread = threading.Thread(target=work)
    thread.start()
    events = sse_events(client.get(f"/v1/finetune/{job_id}/events").text)
    thread.join()
    assert [event["data"].get("job_event") for event in events] == [None, "created", "leased"]


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 30, "²"])
def test_a_stream_refuses_an_id_that_is_none(client, job_id, last):
    answer = client.get(f"/v1/finetune/{job_id}/events", headers={"Last-Event-ID": last.encode()})
    assert answer.status_code == 400


@pytest.mark.slow
def test_heartbeats_come_where_there_is_no_news(tmp_path, tiny_model):
    from fastapi.testclient import TestClient

    from llama_index_lora_embed.service.app import create_app

    made = ServiceSettings(
        data_dir=tmp_path, auth="off", allowed_models={"tiny": tiny_model}, sse_heartbeat_s=0.5, device="cpu"
    )
    with TestClient(create_app(made), "http://127.0.0.1") as client:
        job_id = client.post("/v1/finetune", json=job_request()).json()["job_id"]
        threading.Timer(1.6, client.app.state.stopping.set).start()
        events = sse_events(client.get(f"/v1/finetune/{job_id}/events").text)
    assert [event["event"] for event in events][:4] == ["heartbeat", "progress", "heartbeat", "heartbeat"]


def test_metrics_count_jobs_and_requests(client, job_id):
    client.get(f"/v1/finetune/{job_id}")
    text = client.get("/metrics").text
    assert 'lora_embed_jobs{status="queued"} 1.0' in text
    assert 'lora_embed_requests_total{method="GET",route="/v1/finetune/{job_id}",status="200"} 1.0' in text
    assert job_id not in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([
    *FinetuneRequest.model_fields, *ALLOWED_ARGUMENTS,
    *("device", "dataset", "model_output_path", "continue_from", "teacher"),
])  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(FIELDS, JSON, max_size=4), st.booleans())
def test_a_request_of_anything_is_accepted_or_refused(client, body, whole):
    body = {**({"pairs": [["q", "p"], ["r", "s"]]} if whole else {}), **body}
    answer = client.post("/v1/finetune", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 429), answer.text
    if answer.status_code == 200:
        assert client.delete(f"/v1/finetune/{answer.json()['job_id']}").json()["status"] == "cancelled"


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"pairs": [["q', b"\xff\xfe", b"[" * 50_000, b'{"seed": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_is_refused(client, content):
    answer = client.post("/v1/finetune", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


@pytest.mark.parametrize("field", ["model", "suffix", "query_prompt", "passage_prompt", "unknown", "metadata"])
@pytest.mark.parametrize("text", ["\\ud800", "\\u0000"])
def test_half_a_character_and_nul_are_refused_or_kept_without_harm(client, field, text):
    value = f'{{"{text}": "{text}"}}' if field == "metadata" else f'"{text}"'
    content = f'{{"pairs": [["q", "p"], ["r", "s"]], "{field}": {value}}}'
    answer = client.post("/v1/finetune", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        assert client.get(f"/v1/finetune/{answer.json()['job_id']}").status_code == 200
