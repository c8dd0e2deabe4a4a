"""`lora-embed token`, and that the service knows what it makes."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.helpers.cli import lora_embed, result_of
from tests.helpers.service_processes import until


@pytest.fixture(autouse=True)
def _data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EMBED_DATA_DIR", str(tmp_path / "data"))


def test_a_token_is_printed_once_and_the_service_takes_it_until_it_is_revoked():
    made = result_of('token create "indexing job" --scope embed --scope read')
    assert made["scopes"] == ["read", "embed"]
    headers = {"Authorization": f"Bearer {made['token']}"}
    with TestClient(create_app(ServiceSettings())) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
        (listed,) = result_of("token list")
        assert listed == {**made, "token": None}
        assert made["token"] not in lora_embed("token list").output
        assert result_of(f"token revoke {made['id']}") == {"id": made["id"], "revoked": True}
        until(lambda: client.get("/v1/models", headers=headers).status_code == 401, 10, "the token is refused")
    assert "revoked" in lora_embed("token list").output


def test_the_output_of_create_is_the_token_alone():
    done = lora_embed("token create laptop --scope admin")
    assert done.stdout.startswith("lora-embed-")
    assert len(done.stdout.split()) == 1


def test_wrong_scopes_and_ids_are_errors_that_name_the_right_ones():
    done = lora_embed("token create laptop --scope root")
    assert done.exit_code == 1
    assert "'root'" in done.output
    assert "train, read, embed, admin" in done.output
    assert lora_embed("token create laptop").exit_code == 2
    assert "none yet" in lora_embed("token revoke token-x").output
