"""Jobs of the service on Ray Jobs: killed, paused, cancelled, with the dispatcher killed, and without room."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_index_lora_embed.core.errors import ClusterError
from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.helpers.service import job_request
from tests.helpers.service_processes import (
    ROOT,
    Forks,
    Processes,
    api_of,
    calm_run,
    environment,
    files_of,
    free_port,
    settings_of,
    status_of,
    until,
)

pytest.importorskip("ray", reason="make test-all installs it")
pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]
AUTHENTICATED = {"RAY_AUTH_MODE": "token"}  # the token is in the file where Ray puts it
CLUSTER = """
import ray, sys
ray.init(num_cpus=1, include_dashboard=True, dashboard_port=int(sys.argv[1]), object_store_memory=100_000_000)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address():
    """A cluster of one CPU, so that one job trains and others wait."""
    port = free_port()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **AUTHENTICATED}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
    ) as cluster:
        until(lambda: "ready" in cluster.stdout.readline(), 120, "a cluster")
        yield f"http://127.0.0.1:{port}"
        cluster.stdin.close()


@pytest.fixture(scope="module")
def forks():
    with Forks() as made:
        yield made


def processes_of(job_id):
    """Process ids of the Ray Jobs that train a job."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"python") and job_id.encode() in words:
            found.append(int(place.parent.name))
    return found


def test_jobs_on_ray_survive_kills_and_hear_wishes(tiny_model, tmp_path, forks, address):
    on_ray = {"executor": "ray", "ray_address": address, "ray_cpus": 1}
    env = environment(tmp_path / "data", {"tiny": tiny_model}, lease_s=10, heartbeat_s=0.5, **on_ray) | AUTHENTICATED
    api = api_of(env)

    def checkpoint_of(job_id):
        return api("GET", f"/v1/finetune/{job_id}").json()["checkpoint"]

    with Processes(forks, env, tmp_path / "log") as processes:
        processes.start("server")
        processes.start("dispatcher")
        first = api("POST", "/v1/finetune", json=job_request(epochs=30)).json()["job_id"]
        waiting = api("POST", "/v1/finetune", json=job_request(epochs=30, seed=1)).json()["job_id"]
        until(lambda: checkpoint_of(first), 180, "a checkpoint")
        assert status_of(api, waiting) == "queued", "there is room for one"
        api("DELETE", f"/v1/finetune/{waiting}")
        assert status_of(api, waiting) == "cancelled"
        for pid in processes_of(first):
            os.kill(pid, signal.SIGKILL)
        processes.kill("dispatcher")  # as well
        processes.start("dispatcher")
        before = checkpoint_of(first)
        until(lambda: checkpoint_of(first) > before, 180, "more steps")
        api("POST", f"/v1/finetune/{first}/pause")
        until(lambda: status_of(api, first) in ("paused", "completed"), 60, "a pause")
        assert status_of(api, first) == "paused"
        api("POST", f"/v1/finetune/{first}/resume")
        until(lambda: status_of(api, first) == "completed", 240, "the end")
        assert not processes_of(waiting), "its Ray Job was stopped"
    with Services(settings_of(env)) as services:
        job = services.jobs.get(first)
        kinds = [stored.event.kind for stored in services.jobs.events(first)]
        assert job.attempt >= 3
        assert kinds.count("succeeded") == 1
        assert services.jobs.get(waiting).attempt == 0
        models = services.settings.models_dir
    assert files_of(models / first) == calm_run(env, first, tmp_path / "calm")


def test_a_cluster_that_does_not_answer_is_an_error(tmp_path):
    from llama_index_lora_embed.service.jobs.ray_jobs import RayDispatcher

    settings = ServiceSettings(data_dir=tmp_path, ray_address=f"http://127.0.0.1:{free_port()}")
    with Services(settings) as services, pytest.raises(ClusterError, match=r"no Ray Jobs at .*LORA_EMBED_RAY_ADDRESS"):
        RayDispatcher(services)
