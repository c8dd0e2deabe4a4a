"""Intermediate checkpoints of a job as models."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.service.jobs.state import RunDeleted
from llama_index_lora_embed.service.jobs.worker import Worker
from tests.helpers.service import job_request

pytestmark = pytest.mark.slow


def embedded(client, model):
    answer = client.post("/v1/embeddings", json={"model": model, "input": ["w1 w2 w3"], "input_type": "query"})
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["data"][0]["embedding"])


def test_checkpoints_are_models_until_the_run_is_deleted(client):
    services = client.app.state.services
    job = client.post("/v1/finetune", json=job_request(adapter_scale=0.5)).json()["job_id"]
    Worker(services).run(jobs=1)
    listed = client.get(f"/v1/fine_tuning/jobs/{job}/checkpoints").json()["data"]
    names = {item["step_number"]: item["fine_tuned_model_checkpoint"] for item in listed}
    run = services.settings.models_dir / f"{job}.run"
    kept = [int(folder.name.partition("-")[2]) for folder in run.glob("checkpoint-*")]
    assert len(kept) == 2 < len(names)
    vectors = {}
    for step in kept:
        vectors[step] = embedded(client, names[step])
        own, trained = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (run.with_name(f"{run.name}.step-{step}"), run / f"checkpoint-{step}")
        )
        assert all(np.array_equal(own[name], trained[name] * (0.5 if "lora_B" in name else 1)) for name in trained)
        embed_model = LoraEmbedding(run.with_name(f"{run.name}.step-{step}"), device="cpu")
        assert np.abs(vectors[step] - embed_model.get_query_embedding("w1 w2 w3")).max() < 1e-5
        assert np.array_equal(embedded(client, f"{names[step]}-query"), vectors[step])
    assert np.abs(vectors[kept[0]] - vectors[kept[1]]).max() > 1e-4
    for gone in (names[min(names)], names[kept[0]].replace("ftjob", "x") + "0", "ft:tiny::12345678:ckpt-step-2"):
        assert client.post("/v1/embeddings", json={"model": gone, "input": "w1"}).status_code == 404
    services.apply(job, RunDeleted())
    assert not list(run.parent.glob(f"{run.name}*"))
    assert client.post("/v1/embeddings", json={"model": names[kept[0]], "input": "w1"}).status_code == 404
