import json
import os
import signal
import threading
import time
from functools import partial

import pytest
from safetensors import SafetensorError

from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError
from llama_index_lora_embed.engines import run as run_module
from llama_index_lora_embed.service.data import inline_rows
from llama_index_lora_embed.service.jobs.order import config_of, order
from llama_index_lora_embed.service.jobs.state import CancelRequested, PauseRequested, ResumeRequested, RunDeleted
from llama_index_lora_embed.service.jobs.worker import Worker, main
from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.helpers.service import pairs_of
from tests.helpers.training import signal_in, weights

pytestmark = pytest.mark.slow
ARGUMENTS = {"epochs": 3, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32"}


def ordered(services, **arguments):
    job, _ = order(
        services,
        owner="t",
        model="tiny",
        training=inline_rows("pairs", pairs_of()),
        arguments={**ARGUMENTS, **arguments},
    )
    return job.id


def works(services, attempts=1):
    Worker(services).run(jobs=attempts)


def at_step(monkeypatch, step, action):
    """Do something in a step of a training, once."""
    original, steps = LoraTrainer.training_step, [0]

    def acting(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] == step:
            action()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", acting)


def wished(services, job_id, event):
    """Wish something, and wait until the heartbeat has told it to the training."""
    services.apply(job_id, event)
    time.sleep(3 * services.settings.heartbeat_s)


@pytest.fixture
def service_settings(service_settings):
    return service_settings.model_copy(update={"heartbeat_s": 0.1, "lease_s": 30.0, "sweep_s": 0.2})


@pytest.fixture
def calm(services, tmp_path):
    """The adapter of an undisturbed run of the same data and arguments."""
    job_id = ordered(services)
    config = config_of(services.jobs.get(job_id), services.settings)
    services.apply(job_id, CancelRequested())
    output = config.output.replace(model_output_path=str(tmp_path / "calm"))
    run_module.run_finetune(config.replace(output=output))
    return weights(tmp_path / "calm")


def same(services, job_id, calm):
    tuned = weights(services.settings.models_dir / job_id)
    return tuned.keys() == calm.keys() and all(tuned[name].equal(calm[name]) for name in calm)


def kinds(services, job_id):
    return [stored.event.kind for stored in services.jobs.events(job_id)]


def test_a_job_is_trained_and_its_result_is_that_of_its_manifest(services, calm):
    job_id = ordered(services)
    works(services)
    job = services.jobs.get(job_id)
    manifest = json.loads((services.settings.models_dir / job_id / "finetune.json").read_text())
    assert (job.status, job.attempt, job.progress.step, job.progress.total) == ("succeeded", 1, 9, 9)
    assert job.progress.loss > 0
    assert job.progress.learning_rate > 0
    assert job.result["metrics"] == manifest["metrics"]
    assert job.result["summary"].startswith(job.result["verdict"])
    assert job.checkpoint == 9
    assert same(services, job_id, calm)
    assert not (services.settings.models_dir / f"{job_id}.previous").exists()
    report = services.settings.report(job_id).read_text()
    assert job.result["verdict"] in report
    assert services.settings.without_folders(report) == report, "no folder of this machine"
    services.apply(job_id, RunDeleted())
    assert services.settings.report(job_id).exists()


@pytest.mark.parametrize(("event", "status"), [(PauseRequested(), "paused"), (CancelRequested(), "cancelled")])
def test_a_stopped_job_goes_on_from_its_checkpoint_to_the_same_adapter(services, monkeypatch, calm, event, status):
    job_id = ordered(services)
    at_step(monkeypatch, 5, partial(wished, services, job_id, event))
    works(services)
    job = services.jobs.get(job_id)
    assert (job.status, job.checkpoint, job.worker) == (status, 5, None)
    services.apply(job_id, ResumeRequested())
    works(services)
    job = services.jobs.get(job_id)
    assert (job.status, job.attempt, job.error) == ("succeeded", 2, None)
    assert same(services, job_id, calm)


def test_a_worker_for_one_job_trains_it_beside_others_and_ends(services, calm):
    first, second = ordered(services), ordered(services)
    other = Worker(services)  # uses the same accelerator
    Worker(services, exclusive=False).run_one(second)
    assert (services.jobs.get(first).status, services.jobs.get(second).status) == ("queued", "succeeded")
    assert same(services, second, calm)
    Worker(services, exclusive=False).run_one(second)
    assert services.jobs.get(second).attempt == 1, "it is not queued any more"
    assert other.settings is services.settings


def test_a_worker_of_another_version_trains_nothing(services, monkeypatch):
    for name, text in services.settings.environment().items():
        monkeypatch.setenv(name, text)
    job_id = ordered(services)
    with pytest.raises(SystemExit, match=r"on this node, but 0\.0\.0 at the service"):
        main(job_id, "0.0.0")
    assert services.jobs.get(job_id).status == "queued"


def test_sigterm_stops_the_worker_at_a_checkpoint_and_returns_the_job(services, monkeypatch, calm):
    job_id = ordered(services)
    signal_in(monkeypatch, LoraTrainer, "training_step", signal.SIGTERM, 4)
    Worker(services).run()
    monkeypatch.undo()
    job = services.jobs.get(job_id)
    assert (job.status, job.checkpoint) == ("queued", 4)
    works(services)
    assert services.jobs.get(job_id).status == "succeeded"
    assert same(services, job_id, calm)


def test_sigterm_stops_a_worker_that_waits(services):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    Worker(services).run()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_that_lost_its_lease_stops_at_its_step_and_commits_nothing(services, monkeypatch, calm):
    job_id = ordered(services)

    def lose():
        with services.database.write() as session:
            from llama_index_lora_embed.service.jobs.tables import LeaseRow

            lease = session.get(LeaseRow, job_id)
            lease.expires = 0.0
            session.add(lease)
        assert services.jobs.expire(job_id, 1, 5).state.status == "queued"
        time.sleep(3 * services.settings.heartbeat_s)

    at_step(monkeypatch, 3, lose)
    works(services)
    job = services.jobs.get(job_id)
    assert (job.status, job.attempt) == ("queued", 1)
    assert kinds(services, job_id)[-1] == "lease_expired"
    assert not (services.settings.models_dir / job_id).exists()
    works(services)
    assert services.jobs.get(job_id).status == "succeeded"
    assert same(services, job_id, calm)


def test_an_adapter_whose_worker_died_before_it_could_say_so_is_not_trained_again(services, monkeypatch):
    job_id = ordered(services)
    works(services)
    finished = services.jobs.get(job_id)
    again = ordered(services, seed=1)
    os.rename(services.settings.models_dir / job_id, services.settings.models_dir / again)
    monkeypatch.setattr(run_module, "run_finetune", lambda *_, **__: pytest.fail("it was trained again"))
    works(services)
    job = services.jobs.get(again)
    assert (job.status, job.result) == ("succeeded", finished.result)


def test_a_job_that_takes_too_long_fails_and_keeps_its_checkpoint(services, monkeypatch):
    monkeypatch.setattr(services, "settings", services.settings.model_copy(update={"max_job_seconds": 1.0}))
    job_id = ordered(services)
    at_step(monkeypatch, 3, lambda: time.sleep(1.5))
    works(services)
    job = services.jobs.get(job_id)
    assert (job.status, job.error.code, job.checkpoint) == ("failed", "time_limit", 3)
    assert list((services.settings.models_dir / f"{job_id}.run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), "disk_full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (OutputDirectoryError("a failed write", "free space", "Free some."), "invalid_data"),
        (RuntimeError("secret: /root/.ssh"), "internal_error"),
    ],
)
def test_an_error_fails_the_job_and_the_worker_goes_on(services, monkeypatch, error, code):
    job_id = ordered(services)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(run_module, "run_finetune", fail)
    works(services)
    job = services.jobs.get(job_id)
    assert (job.status, job.error.code) == ("failed", code)
    assert "secret" not in job.error.message
    monkeypatch.undo()
    services.apply(job_id, ResumeRequested())
    works(services)
    assert services.jobs.get(job_id).status == "succeeded"


def test_what_clients_are_told_names_no_folder_of_the_service(services, monkeypatch, tiny_model):
    job_id = ordered(services)
    place = services.settings.models_dir / job_id

    def fail(config, **kwargs):
        raise OutputDirectoryError(f"{place} on {config.base.model_id}", "another", "Move it.")

    monkeypatch.setattr(run_module, "run_finetune", fail)
    works(services)
    message = services.jobs.get(job_id).error.message
    assert str(services.settings.folder) not in message
    assert tiny_model not in message
    assert f"<models>/{job_id} on tiny" in message


def test_one_accelerator_has_one_worker(services, service_settings):
    worker = Worker(services)
    with Services(service_settings) as other, pytest.raises(ConfigError, match="another worker"):
        Worker(other)
    del worker


def test_a_job_of_nodes_and_one_of_labelled_pairs_are_trained(services, nodes):
    rows = [json.loads(node.to_json()) for node in nodes]
    scored = [{**row, "score": number % 2} for number, row in enumerate(pairs_of())]
    made = [
        order(services, owner="t", model="tiny", training=inline_rows(name, rows), arguments=arguments)[0].id
        for name, rows, arguments in (
            ("nodes", rows, {"batch_size": 4, "val_fraction": 0.3}),
            ("pairs", scored, {"epochs": 1}),
        )
    ]
    works(services, attempts=2)
    for job_id in made:
        job = services.jobs.get(job_id)
        assert job.status == "succeeded", job.error
        assert job.result["metrics"]["tuned"]
