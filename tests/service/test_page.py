"""The commands of docs/service.md, run against a service in processes of its own."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llama_index_lora_embed.service.settings import ServiceSettings
from tests.conftest import make_tiny_model
from tests.helpers.service import sse_events
from tests.helpers.service_processes import Forks, Processes, environment

PAGE = (Path(__file__).parents[2] / "docs" / "service.md").read_text(encoding="utf-8")
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None or not hasattr(os, "fork"), reason="needs curl and fork")
def test_the_commands_of_the_page_train_a_model(tmp_path):
    start, train = [block for block in blocks("sh") if "LORA_EMBED_AUTH" in block or "job.json" in block]
    exported = dict(re.findall(r"^export (LORA_EMBED_\w+)=(\S+)", start, re.MULTILINE))
    assert exported["LORA_EMBED_AUTH"] == "off"
    assert json.loads(exported["LORA_EMBED_ALLOWED_MODELS"].strip("'")) == [MODEL]
    assert set(re.findall(r"python -m (\S+) &", start)) == {
        "llama_index_lora_embed.service",
        "llama_index_lora_embed.service.jobs.worker",
    }
    (tmp_path / "job.json").write_text(blocks('json title="job.json"')[0])
    model = make_tiny_model(tmp_path, max_seq_length=256, positions=512)
    env = environment(tmp_path / "data", {MODEL: str(model)})
    with Forks() as forks, Processes(forks, env, tmp_path / "log") as processes:
        processes.start("server")
        processes.start("worker")
        script = train.replace(":8080", f":{env['LORA_EMBED_PORT']}").replace(
            "--fail-with-body", "--fail-with-body --retry 9 --retry-connrefused", 1
        )
        done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    stream, _, shown = done.stdout.rpartition("\n\n")
    assert sse_events(stream)[-1]["event"] == "complete"
    job = json.loads(shown)
    assert job["status"] == "completed"
    assert job["verdict"]


def test_the_page_names_settings_and_routes_that_exist(client):
    names = {name.upper() for name in ServiceSettings.model_fields}
    assert set(re.findall(r"LORA_EMBED_([A-Z_]+)", PAGE)) - {""} <= names
    paths = client.get("/openapi.json").json()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert set(re.findall(r"`(GET|POST|DELETE) (/\S+)`", PAGE)) <= routes
