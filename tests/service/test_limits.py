"""Rates, sizes and strict JSON."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.testclient import TestClient
from pydantic import BaseModel

from llama_index_lora_embed.service.errors import ServiceError, install_error_handlers
from llama_index_lora_embed.service.limits import BodyLimit, Rates, StrictRoute, strict_json
from llama_index_lora_embed.service.settings import ServiceSettings

MOST = 300_000


class Body(BaseModel):
    values: Any


@pytest.fixture
def client() -> TestClient:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/json")
    def echo(body: Body) -> Any:
        return body.values

    @router.post("/v1/files")
    async def size(request: Request) -> int:
        return len(await request.body())

    app = FastAPI()
    app.state.services = SimpleNamespace(settings=ServiceSettings(auth="off"))
    app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=MOST, patience_s=30, larger={"/v1/files": 10_000})
    install_error_handlers(app)
    return TestClient(app)


def test_a_caller_may_send_its_rate_at_once_and_then_as_much_as_time_gives_back():
    now = 0.0
    rates = Rates(60, clock=lambda: now)
    for _ in range(60):
        rates.take("one")
    with pytest.raises(ServiceError) as refused:
        rates.take("one")
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": "1"}
    rates.take("another")
    now = 2.0
    rates.take("one")
    rates.take("one")
    with pytest.raises(ServiceError):
        rates.take("one")


@pytest.mark.parametrize("known_length", [True, False])
@pytest.mark.parametrize(("path", "limit"), [("/json", MOST), ("/v1/files", 10_000 + 2**16)])
def test_a_body_beyond_the_limit_is_refused_by_its_header_or_while_it_arrives(client, path, limit, known_length):
    def send(size: int) -> Any:
        body = b'{"values": "' + b"a" * (size - 14) + b'"}'
        content = body if known_length else (body[i : i + 9999] for i in range(0, size, 9999))
        return client.post(path, content=content, headers={"Content-Type": "application/json"})

    assert send(limit).status_code == 200
    refused = send(limit + 1)
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"
    assert str(limit) in refused.json()["error"]["message"]


@pytest.mark.parametrize("length", ["-1", "9" * 5000, "1e9", "0x10"])
def test_odd_lengths_are_no_server_errors(client, length):
    answer = client.post("/json", content=b"{}", headers={"Content-Length": length})
    assert 400 <= answer.status_code < 500


def test_an_address_with_a_zero_byte_is_refused(client):
    for address in ("/js%00on", "/json?after=%00"):
        assert client.get(address).status_code == 404


def test_a_compressed_body_is_refused_whatever_it_would_become(client):
    answer = client.post("/json", content=b"\x1f\x8b\x08\x00", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert "Content-Encoding" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "Expecting"),
        (b'{"values": NaN}', "NaN"),
        (b'{"values": [Infinity]}', "Infinity"),
        (b'{"values": 1e999}', "1e999"),
        (b'{"values": "\xff"}', "UTF-8"),
        ('{"values": 1}'.encode("utf-16"), "UTF-8"),
        (rb'{"values": "\ud800"}', "surrogate"),
        (b'{"values": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"values": ' + b"9" * 5000 + b"}", "digits"),
    ],
    ids=["truncated", "nan", "infinity", "beyond-double", "bytes", "utf-16", "surrogate", "depth", "digits"],
)
def test_what_is_not_json_is_refused_with_the_reason(client, body, reason):
    answer = client.post("/json", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    assert reason in answer.json()["error"]["message"]


def test_strict_json_reads_all_that_json_allows():
    body = r'{"a": [1, -2.5e3, true, null, "\ud83d\ude00 \u0000 ü"], "b": {}}'.encode()
    assert strict_json(body) == {"a": [1, -2500.0, True, None, "😀 \0 ü"], "b": {}}
