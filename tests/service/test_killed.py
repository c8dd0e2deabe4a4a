"""The service in processes of its own: killed, stopped, paused, and on a disk that is full."""

import os
import random
import signal
import time

import httpx
import pytest

from llama_index_lora_embed.service.services import Services
from tests.helpers.servers import postgresql, redis_server
from tests.helpers.service import job_request, sse_events
from tests.helpers.service_processes import (
    Forks,
    Processes,
    api_of,
    calm_run,
    commands,
    environment,
    files_of,
    settings_of,
    status_of,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")]
SERVER, WORKER = "llama_index_lora_embed.service", "llama_index_lora_embed.service.jobs.worker"


@pytest.fixture(scope="module")
def forks():
    with Forks() as made:
        yield made


def test_ten_kills_at_random_moments_end_no_job_twice_and_leave_the_adapters_of_calm_runs(tiny_model, tmp_path, forks):
    env = environment(tmp_path / "data", {"tiny": tiny_model}, max_lost_attempts=50)
    api, rng = api_of(env), random.Random(0)
    bodies = [job_request(epochs=6, seed=seed) for seed in range(3)]
    with Processes(forks, env, tmp_path / "log") as processes:
        for name in ("server", "worker"):
            processes.start(name)
        jobs = [api("POST", "/v1/finetune", json=bodies[0]).json()["job_id"]]

        def statuses():
            return {status_of(api, job) for job in jobs}

        for number in range(10):
            killed = rng.choice((["worker"], ["worker"], ["server"], ["server", "worker"]))
            if "worker" in killed:  # a machine may be too fast or too slow for moments of the clock alone
                until(lambda: {"running"} & (now := statuses()) or not {"queued"} & now, 60, "a job in training")
            time.sleep(rng.uniform(0.0, 1.0))
            for name in killed:
                processes.kill(name)
                processes.start(name)
            if number in (2, 4):
                jobs.append(api("POST", "/v1/finetune", json=bodies[len(jobs)]).json()["job_id"])
        until(lambda: statuses() <= {"completed", "failed"}, 120, "the end of all jobs")
    attempts = 0
    with Services(settings_of(env)) as services:
        assert len(services.jobs.list()[0]) == len(set(jobs)) == 3
        for job_id in jobs:
            job = services.jobs.get(job_id)
            assert job.status == "succeeded", job.error
            kinds = [stored.event.kind for stored in services.jobs.events(job_id)]
            assert kinds.count("succeeded") == 1
            assert kinds[-1] == "succeeded"
            attempts += job.attempt
        models = services.settings.models_dir
    assert attempts > len(jobs), "the kills must have met jobs in training"
    assert not list(models.glob("*.previous")), "no job was written twice"
    for number, job_id in enumerate(jobs):
        assert files_of(models / job_id) == calm_run(env, job_id, tmp_path / f"calm{number}")


@pytest.mark.extended
def test_a_worker_that_was_frozen_longer_than_its_lease_commits_nothing(tiny_model, tmp_path, forks):
    env = environment(tmp_path / "data", {"tiny": tiny_model}, lease_s=3)
    api = api_of(env)
    with Processes(forks, env, tmp_path / "log") as processes:
        processes.start("server")
        processes.start("frozen")
        job_id = api("POST", "/v1/finetune", json=job_request(epochs=10)).json()["job_id"]
        until(lambda: api("GET", f"/v1/finetune/{job_id}").json()["checkpoint"], 60, "a checkpoint")
        os.kill(processes.pids["frozen"], signal.SIGSTOP)
        until(lambda: status_of(api, job_id) == "queued", 30, "the lease's end")
        processes.start("other", LORA_EMBED_DEVICE="cpu:0")  # on another accelerator
        time.sleep(2)
        assert status_of(api, job_id) == "queued", "the frozen process still holds the run directory"
        os.kill(processes.pids["frozen"], signal.SIGCONT)
        until(lambda: status_of(api, job_id) == "completed", 60, "the end")
    with Services(settings_of(env)) as services:
        events = services.jobs.events(job_id)
        assert services.jobs.get(job_id).attempt >= 2
        assert [stored.event.kind for stored in events].count("succeeded") == 1
        models = services.settings.models_dir
    assert files_of(models / job_id) == calm_run(env, job_id, tmp_path / "calm")


def test_the_commands_start_train_and_stop_gracefully(tiny_model, tmp_path):
    env = environment(tmp_path / "data", {"tiny": tiny_model}, log_format="json", lease_s=30)
    api = api_of(env)
    with commands(env, SERVER, WORKER) as (server, worker):
        job_id = api("POST", "/v1/finetune", json=job_request(epochs=200)).json()["job_id"]
        until(lambda: api("GET", f"/v1/finetune/{job_id}").json()["checkpoint"], 120, "a checkpoint")
        worker.terminate()
        assert worker.wait(timeout=30) == 0
        job = api("GET", f"/v1/finetune/{job_id}").json()
        assert (job["status"], job["attempt"], job["error"]) == ("queued", 1, None)
        url = f"http://127.0.0.1:{env['LORA_EMBED_PORT']}/v1/finetune/{job_id}/events"
        with httpx.stream("GET", url, timeout=10) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.terminate()
            rest = "\n".join(lines)
        assert server.wait(timeout=30) in (0, -signal.SIGTERM), "uvicorn raises the signal again at the end"
    assert sse_events(rest)[-1]["data"]["status"] == "queued"
    step = job["checkpoint"]
    checkpoints = os.listdir(tmp_path / "data" / "models" / f"{job_id}.run")
    assert f"checkpoint-{step}" in checkpoints


def test_a_full_disk_fails_the_job_and_service_and_worker_live(tiny_model, tmp_path, forks):
    env = environment(tmp_path / "data", {"tiny": tiny_model})
    api = api_of(env)
    with Processes(forks, env, tmp_path / "log") as processes:
        processes.start("server")
        processes.start("worker", file_limit_mb=2)
        large = api("POST", "/v1/finetune", json=job_request(lora_r=1024, epochs=1)).json()["job_id"]
        small = api("POST", "/v1/finetune", json=job_request(epochs=1)).json()["job_id"]
        until(lambda: status_of(api, large) in ("failed", "completed"), 60, "the end of the large job")
        error = api("GET", f"/v1/finetune/{large}").json()["error"]
        assert error["code"] == "disk_full"
        assert "disk is full" in error["message"]
        until(lambda: status_of(api, small) == "completed", 60, "the end of the small job")
        assert api("GET", "/ready").status_code == 200
        assert processes.alive("worker")


@pytest.mark.extended
def test_on_postgresql_and_redis_a_killed_worker_costs_nothing(tiny_model, tmp_path, forks):
    with postgresql() as database, redis_server() as queue:
        env = environment(tmp_path / "data", {"tiny": tiny_model}, database_url=database, queue_url=queue)
        api = api_of(env)
        with Processes(forks, env, tmp_path / "log") as processes:
            processes.start("server")
            processes.start("worker")
            job_id = api("POST", "/v1/finetune", json=job_request(epochs=6)).json()["job_id"]
            until(lambda: api("GET", f"/v1/finetune/{job_id}").json()["checkpoint"], 60, "a checkpoint")
            for name in ("worker", "server"):
                processes.kill(name)
                processes.start(name)
            until(lambda: status_of(api, job_id) == "completed", 60, "the end")
            stream = api("GET", f"/v1/finetune/{job_id}/events").text
        models = settings_of(env).models_dir
        assert not (tmp_path / "data" / "service.db").exists()
        assert files_of(models / job_id) == calm_run(env, job_id, tmp_path / "calm")
    assert [event["event"] for event in sse_events(stream)].count("complete") == 1
