import os
import time

import pytest
from sqlmodel import select

from llama_index_lora_embed.service.data import inline_rows
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.files import FileRow
from llama_index_lora_embed.service.jobs.order import order
from llama_index_lora_embed.service.jobs.state import CancelRequested, ResumeRequested
from llama_index_lora_embed.service.jobs.sweep import Sweep

DAY = 86_400


def ordered(services, query="q"):
    return order(services, owner="t", model="tiny", training=inline_rows("pairs", [[query, "p"]]))[0].id


def test_a_lost_message_is_sent_again_and_a_duplicate_is_harmless(services):
    jobs = [ordered(services, str(number)) for number in range(3)]
    while services.queue.take(0):
        pass
    sweep = Sweep(services)
    sweep.run()
    sweep.run()
    assert [services.queue.take(0) for _ in range(4)] == [*jobs, None]
    assert services.jobs.lease(jobs[0], "a", 60) is not None
    assert services.jobs.lease(jobs[0], "b", 60) is None


def test_an_expired_lease_sends_the_job_back(services):
    job_id = ordered(services)
    services.queue.take(0)
    services.jobs.lease(job_id, "dead", 0.01)
    time.sleep(0.02)
    Sweep(services).run()
    assert services.jobs.get(job_id).status == "queued"
    assert services.queue.take(0) == job_id


def test_old_files_and_runs_are_deleted_and_those_of_live_jobs_stay(services):
    live, ended, recent = (ordered(services, name) for name in ("live", "ended", "recent"))
    for job_id in (live, ended, recent):
        (services.settings.models_dir / f"{job_id}.run" / "checkpoint-1").mkdir(parents=True)
        (services.settings.models_dir / job_id).mkdir()
    services.apply(ended, CancelRequested(time=time.time() - 31 * DAY))
    services.apply(recent, CancelRequested())
    old, new = (services.files.add([b"x"], name, owner="t") for name in ("old", "new"))
    with services.database.write() as session:
        row = session.exec(select(FileRow).where(FileRow.id == old.id)).one()
        row.created -= 31 * DAY
        session.add(row)
    Sweep(services).run()
    assert os.listdir(services.settings.files_dir) == [new.id]
    assert sorted(os.listdir(services.settings.jobs_dir)) == sorted([live, recent])
    kept = {*(f"{job_id}.run" for job_id in (live, recent)), live, ended, recent}
    assert set(os.listdir(services.settings.models_dir)) == kept
    with pytest.raises(ServiceError, match="deleted after its end"):
        services.apply(ended, ResumeRequested())
    assert services.apply(recent, ResumeRequested()).status == "queued"


def test_data_without_a_job_is_deleted_once_it_is_an_hour_old(services):
    for name, age in (("ftjob-orphan", 7200), ("ftjob-young", 10)):
        folder = services.settings.jobs_dir / name
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    Sweep(services).run()
    assert os.listdir(services.settings.jobs_dir) == ["ftjob-young"]


def test_a_sweep_that_fails_is_tried_again(services, monkeypatch):
    job_id = ordered(services)
    services.queue.take(0)
    sweep = Sweep(services)

    def broken():
        raise OSError("the database is gone")

    monkeypatch.setattr(services.jobs, "expired", broken)
    sweep.run()
    monkeypatch.undo()
    sweep.run()
    assert services.queue.take(0) == job_id
