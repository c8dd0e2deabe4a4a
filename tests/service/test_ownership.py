"""What belongs to one token does not exist for another, and no request makes a model run code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.models import fine_tuned_model
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.helpers.service import pairs_of, succeeded_job

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def client(tmp_path: Path, tiny_model: str) -> Iterator[TestClient]:
    settings = ServiceSettings(data_dir=tmp_path / "data", allowed_models={"tiny": tiny_model}, device="cpu")
    with TestClient(create_app(settings), raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def tokens(client):
    """Headers of an owner, of another token with the same scopes, and of an admin."""
    made = {}
    for name in ("owner", "other", "admin"):
        scopes = ["admin"] if name == "admin" else ["train", "read", "embed"]
        row, secret = client.app.state.services.tokens.create(name, scopes)
        made[name] = (row.id, {"Authorization": f"Bearer {secret}"})
    return made


@pytest.fixture
def job(client, tokens, adapter):
    return succeeded_job(client.app.state.services, adapter, owner=tokens["owner"][0])


def statuses(client, tokens, method, address, **request):
    callers = (tokens["other"], tokens["admin"])
    return [client.request(method, address, headers=headers, **request).status_code for _, headers in callers]


def test_jobs_of_another_token_do_not_exist(client, tokens, job):
    theirs = f"/v1/fine_tuning/jobs/{job.id}"
    for address in (f"/v1/finetune/{job.id}", theirs, f"{theirs}/events", f"{theirs}/checkpoints"):
        assert statuses(client, tokens, "get", address) == [404, 200], address
    for action in ("cancel", "pause", "resume"):
        assert statuses(client, tokens, "post", f"/v1/fine_tuning/jobs/{job.id}/{action}") == [404, 400]
        assert client.app.state.services.jobs.get(job.id).status == "succeeded"
    for address in ("/v1/fine_tuning/jobs", "/v1/finetune"):
        assert client.get(address, headers=tokens["other"][1]).json()["data"] == []
        assert len(client.get(address, headers=tokens["admin"][1]).json()["data"]) == 1


def test_models_of_another_tokens_jobs_do_not_exist(client, tokens, job):
    for name in (fine_tuned_model(job), job.id):
        body = {"model": name, "input": "w1", "queries": ["w1"], "corpus": ["w1"], "relevance": [[0]]}
        for address in ("/v1/embeddings", "/v1/evaluate"):
            assert statuses(client, tokens, "post", address, json=body) == [404, 200]
        assert statuses(client, tokens, "post", "/v1/adapters/x/versions", json=body)[0] == 404
    assert statuses(client, tokens, "get", f"/v1/models/{fine_tuned_model(job)}") == [404, 200]


def test_files_of_another_token_do_not_exist(client, tokens):
    content = "".join(json.dumps(row) + "\n" for row in pairs_of()).encode()
    made = client.post(
        "/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"}, headers=tokens["owner"][1]
    ).json()
    for end in ("", "/content"):
        assert statuses(client, tokens, "get", f"/v1/files/{made['id']}{end}") == [404, 200]
    body = {"model": "tiny", "training_file": made["id"]}
    assert statuses(client, tokens, "post", "/v1/fine_tuning/jobs", json=body) == [400, 200]
    assert client.get("/v1/files", headers=tokens["other"][1]).json()["data"] == []
    assert statuses(client, tokens, "delete", f"/v1/files/{made['id']}") == [404, 200]


def test_an_adapter_is_read_by_all_and_changed_by_its_owner_and_admins(client, tokens, job, adapter):
    def add(who, model):
        return client.post("/v1/adapters/handbook/versions", headers=tokens[who][1], json={"model": model}).status_code

    others = succeeded_job(client.app.state.services, adapter, owner=tokens["other"][0])
    assert [add("owner", job.id), add("other", others.id), add("admin", others.id)] == [200, 403, 200]
    assert statuses(client, tokens, "post", "/v1/adapters/handbook/promote", json={"version": "v1"}) == [403, 200]
    assert statuses(client, tokens, "post", "/v1/adapters/handbook/rollback") == [403, 400]
    assert statuses(client, tokens, "get", "/v1/adapters/handbook/versions") == [200, 200]
    assert statuses(client, tokens, "post", "/v1/embeddings", json={"model": "handbook", "input": "w1"}) == [200, 200]


def test_no_request_lets_a_model_run_code(client, tokens, tiny_model, tmp_path):
    """The model is allowed, and its files name code beside them, which would write a file."""
    services = client.app.state.services
    model, written = Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "written"
    code = f"open({str(written)!r}, 'w').write('run')\nfrom transformers import BertModel as Evil\n"
    (folder,) = {path.parent for path in model.rglob("config.json") if "hidden_size" in path.read_text()}
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    config["model_type"] = "unknown-to-transformers"
    (folder / "config.json").write_text(json.dumps(config))
    for place in {model, folder}:
        (place / "evil.py").write_text(code)
    services.settings.allowed_models["evil"] = str(model)
    body = {"model": "evil", "input": "w1", "trust_remote_code": True}
    answer = client.post("/v1/embeddings", headers=tokens["owner"][1], json=body)
    assert answer.status_code != 200
    assert not written.exists()
    job = {"model": "tiny", "pairs": pairs_of(), "trust_remote_code": True}
    answer = client.post("/v1/finetune", headers=tokens["owner"][1], json=job)
    assert answer.status_code == 400
    assert "trust_remote_code" in answer.text
    for name in (str(model), "../model", f"{model}/../model", "https://example.org/model"):
        answer = client.post("/v1/embeddings", headers=tokens["owner"][1], json={"model": name, "input": "w1"})
        assert answer.status_code == 404
