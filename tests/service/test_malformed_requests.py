"""No request, however malformed, is answered with 5xx or with anything from the inside, and nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.jobs.state import JobState
from llama_index_lora_embed.service.models import fine_tuned_model
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.helpers.service import succeeded_job

pytestmark = pytest.mark.filterwarnings("ignore")
HEADERS = {"Host": "127.0.0.1"}
QUICK, THOROUGH = 30, 1000


@pytest.fixture(scope="module")
def app(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    limits = {"max_body_bytes": 200_000, "max_upload_bytes": 100_000}
    limits |= dict.fromkeys(["requests_per_minute", "max_queued_jobs", "max_jobs_per_token"], 10**6)
    folder, models = tmp_path_factory.mktemp("fuzzed"), {"tiny": tiny_model}
    return create_app(ServiceSettings(data_dir=folder, auth="off", allowed_models=models, device="cpu", **limits))


@pytest.fixture(scope="module")
def job(app: FastAPI, adapter: Path) -> JobState:
    """What must still be there afterwards."""
    return succeeded_job(app.state.services, adapter, metadata={"kept": "yes"})


@pytest.fixture(scope="module")
def client(app: FastAPI, job: JobState) -> Iterator[TestClient]:
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as made:
        yield made


def check(answer: Any, app: FastAPI) -> None:
    """The answer of a server that knows what it does."""
    assert answer.status_code < 500, answer.text
    inside = ("Traceback", 'File "', str(app.state.services.settings.folder), "sqlalchemy", "site-packages")
    shown = answer.text
    assert not [text for text in inside if text in shown], shown
    if answer.status_code >= 400:
        assert {"message", "type", "param", "code"} <= set(answer.json()["error"])


def check_nothing_lost(client: TestClient, job: JobState) -> None:
    assert client.get(f"/v1/fine_tuning/jobs/{job.id}").json()["metadata"] == {"kept": "yes"}
    answer = client.post("/v1/embeddings", json={"model": fine_tuned_model(job), "input": "w1 w2"})
    assert len(answer.json()["data"][0]["embedding"]) == 32


def routes(app: FastAPI) -> list[tuple[str, str]]:
    paths = app.openapi()["paths"]
    return [(method, path) for path, operations in paths.items() for method in operations if "/events" not in path]


_PLACES = ["../../etc/passwd", "a\0b", "%00", "\r\nX: y", "tiny", "ft:tiny::x"]
_TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(_PLACES)
_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=8,
)
_NAMES = (
    *("model", "input", "pairs", "triplets", "nodes", "training_file", "validation_file", "suffix", "metadata"),
    *("queries", "corpus", "relevance", "dimensions", "input_type", "encoding_format", "hyperparameters", "method"),
    *("seed", "version", "evaluation", "gate", "epochs"),
)
_FIELDS = st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=8)


def _spoilt(text: str, cut: int, how: str) -> bytes:
    body = text.encode()
    return {
        "whole": body,
        "truncated": body[: cut % (len(body) + 1)],
        "bad UTF-8": body[: cut % (len(body) + 1)] + b"\xff\xfe" + body,
        "UTF-16": text.encode("utf-16"),
        "nested": b"[" * (cut * 100) + body,
        "zero bytes": b"\0" * cut + body,
    }[how]


_BODIES = st.builds(
    _spoilt,
    (_FIELDS | _JSON).map(json.dumps),
    st.integers(0, 1000),
    st.sampled_from(["whole", "whole", "truncated", "bad UTF-8", "UTF-16", "nested", "zero bytes"]),
) | st.binary(max_size=200)
_TYPES = st.sampled_from(
    [
        *("application/json", "application/json; charset=utf-16", "text/plain", "", "a/b; c="),
        *("multipart/form-data; boundary=x", "multipart/form-data"),
    ]
)
_QUERIES = st.dictionaries(st.sampled_from(["after", "limit", "order", "status", "metadata[a]"]), _TEXT)
_PARTS = ("job_id", "file_id", "adapter", "version", "model")


def address_of(path: str, name: str) -> str:
    """The path with this name in place of its parameters."""
    for part in _PARTS:
        path = path.replace("{" + part + "}", quote(name, safe="") or "x")
    return path


@pytest.mark.parametrize(
    "examples",
    [pytest.param(QUICK, marks=pytest.mark.slow), pytest.param(THOROUGH, marks=pytest.mark.extended)],
)
def test_bodies_that_make_no_sense_are_refused(client, app, job, examples):
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(routes(app)), _BODIES, _TYPES, _TEXT, _QUERIES)
    def send(route, body, kind, name, query):
        method, path = route
        headers = {"Content-Type": kind}
        check(client.request(method, address_of(path, name), content=body, headers=headers, params=query), app)

    send()
    check_nothing_lost(client, job)


@pytest.mark.parametrize(
    "examples",
    [pytest.param(2, marks=pytest.mark.slow), pytest.param(THOROUGH // 20, marks=pytest.mark.extended)],
)
def test_requests_that_the_schema_allows_or_nearly_so_are_answered(client, app, job, examples):
    import schemathesis

    schema = schemathesis.openapi.from_dict(app.openapi())
    schema.app = app
    found = [result.ok() for result in schema.get_all_operations()]
    operations = [operation for operation in found if "/events" not in operation.path]  # streams do not end
    assert len(operations) > 25
    for operation in operations:
        case_of = operation.as_strategy() | operation.as_strategy(schemathesis.GenerationMode.NEGATIVE)

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case_of)
        def send(case):
            check(case.call(headers=HEADERS), app)

        send()
    check_nothing_lost(client, job)


def test_a_zip_bomb_is_neither_read_nor_stored(client, app):
    import gzip

    bomb = gzip.compress(b"0" * 50_000_000)
    assert len(bomb) < 100_000
    answer = client.post("/v1/embeddings", content=bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    upload = client.post("/v1/files", files={"file": ("a.jsonl", bomb)}, data={"purpose": "fine-tune"}).json()
    assert upload["bytes"] == len(bomb), "an upload is stored as it is"
    answer = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": upload["id"]})
    assert answer.status_code == 400
    check(answer, app)


def test_a_body_of_100_mb_is_refused(client, app):
    part = b"0" * 1_000_000
    answer = client.post("/v1/finetune", content=(part for _ in range(100)))
    assert answer.status_code == 413
    check(answer, app)
    answer = client.post("/v1/finetune", content=b"{}", headers={"Content-Length": "100000000"})
    assert answer.status_code == 413
