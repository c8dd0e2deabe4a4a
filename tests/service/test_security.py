"""API tokens, scopes, and services without tokens."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.database import Database
from llama_index_lora_embed.service.security import SCOPES, Tokens
from llama_index_lora_embed.service.settings import ServiceSettings


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[Tokens]:
    database = Database(f"sqlite:///{tmp_path / 'tokens.db'}")
    yield Tokens(database)
    database.close()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    settings = ServiceSettings(data_dir=tmp_path / "data", allowed_models={"tiny": "nowhere"}, requests_per_minute=20)
    with TestClient(create_app(settings)) as client:
        yield client


def bearer(client: TestClient, *scopes: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {client.app.state.services.tokens.create('test', scopes)[1]}"}


def test_a_token_is_known_by_its_text_and_only_its_hash_is_stored(tokens, tmp_path):
    row, secret = tokens.create("CI of the handbook", ["embed", "read"])
    caller = tokens.verify(secret)
    assert caller is not None
    assert (caller.id, caller.scopes, caller.owner) == (row.id, {"read", "embed"}, row.id)
    assert len(secret) > 43
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in stored
    assert row.sha256.encode() in stored
    assert [listed.name for listed in tokens.list()] == ["CI of the handbook"]


def test_any_other_text_is_no_token(tokens):
    _, secret = tokens.create("one", ["embed"])
    for other in (secret[:-1], secret + "x", secret.upper(), "", "ü\ud800"):
        assert tokens.verify(other) is None


def test_the_stored_hash_is_no_token(tokens):
    row, _ = tokens.create("one", ["embed"])
    assert tokens.verify(row.sha256) is None


def test_a_revoked_token_is_refused(tokens):
    row, secret = tokens.create("one", ["admin"])
    tokens.revoke(row.id)
    assert tokens.verify(secret) is None
    with pytest.raises(ConfigError, match=row.id):
        tokens.revoke("token-of-nobody")


@pytest.mark.parametrize(
    ("name", "scopes", "expected"),
    [("a", [], "scopes"), ("a", ["embed", "root"], "'root'"), ("", ["embed"], "name"), ("a\nb", ["embed"], "name")],
)
def test_wrong_names_and_scopes_are_refused(tokens, name, scopes, expected):
    with pytest.raises(ConfigError, match=expected):
        tokens.create(name, scopes)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic dXNlcjpwYXNz",
        "bearer\t",
        "Bearer " + "a" * 5000,
        b"Bearer \xff",
    ],
)
def test_requests_without_a_valid_token_are_refused_and_told_how(client, header):
    headers = {} if header is None else {"Authorization": header}
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert "Authorization: Bearer" in error["message"]


def test_the_upload_of_a_stranger_is_not_stored_before_the_token_is_looked_at(client, monkeypatch):
    def form(*_: object, **__: object) -> None:
        raise AssertionError("the body was parsed")

    monkeypatch.setattr(Request, "form", form)
    given = {"files": {"file": ("t.jsonl", b"{}" * 100_000)}, "data": {"purpose": "fine-tune"}}
    assert client.post("/v1/files", headers={"Authorization": "Bearer wrong"}, **given).status_code == 401


def test_each_route_asks_for_its_scope(client):
    """All routes of the application, so that none can be forgotten."""
    public = {"/health", "/ready", "/metrics", "/", "/openapi.json", "/docs", "/redoc", "/docs/oauth2-redirect"}
    asked = 0
    for path, operations in client.app.openapi()["paths"].items():
        for method in operations:
            if path in public or not path.startswith("/v1/"):
                continue
            asked += 1
            address = re.sub(r"\{\w+\}", "x", path)
            assert client.request(method, address).status_code == 401, f"{method} {path}"
    assert asked > 8


@pytest.mark.parametrize("scope", SCOPES)
def test_a_token_may_do_what_its_scope_says_and_nothing_else(client, scope):
    headers = bearer(client, scope)
    allowed = {
        "read": client.get("/v1/adapters", headers=headers).status_code != 403,
        "embed": client.post("/v1/embeddings", headers=headers, json={}).status_code != 403,
        "train": client.post("/v1/adapters/x/rollback", headers=headers).status_code != 403,
    }
    assert allowed == {name: scope in (name, "admin") for name in allowed}
    assert (client.get("/v1/models", headers=headers).status_code == 200) == (scope != "train")


def test_beyond_its_rate_a_token_is_told_to_wait(client):
    headers, other = bearer(client, "read"), bearer(client, "read")
    answers = [client.get("/v1/models", headers=headers) for _ in range(21)]
    assert [answer.status_code for answer in answers] == [200] * 20 + [429]
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 3
    assert answers[-1].json()["error"]["type"] == "rate_limit_error"
    assert client.get("/v1/models", headers=other).status_code == 200


@pytest.fixture
def open_client(tmp_path: Path) -> Iterator[TestClient]:
    settings = ServiceSettings(data_dir=tmp_path / "data", auth="off", allowed_models={"tiny": "nowhere"})
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8080") as client:
        yield client


def test_without_tokens_only_a_loopback_host_is_allowed():
    with pytest.raises(ConfigError, match="loopback"):
        ServiceSettings(auth="off", host="0.0.0.0")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8080", "Origin": "http://localhost:8080"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "["}, 403),
    ],
)
def test_a_service_without_tokens_refuses_web_pages_from_elsewhere(open_client, headers, status):
    assert open_client.get("/v1/models", headers=headers).status_code == status


def test_an_existing_database_gets_the_table(tmp_path):
    path = tmp_path / "old.db"
    sqlite3.connect(path).execute("CREATE TABLE job (id TEXT)").connection.close()
    database = Database(f"sqlite:///{path}")
    assert Tokens(database).list() == []
    database.close()
