import sqlite3
import threading
import time

import pytest
from sqlmodel import SQLModel, select

from llama_index_lora_embed.service.database import Database
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.jobs.state import (
    CancelRequested,
    JobSpec,
    PauseRequested,
    Progress,
    Progressed,
    ResumeRequested,
    Stopped,
    Succeeded,
)
from llama_index_lora_embed.service.jobs.store import JobRow, JobStore
from tests.helpers.servers import postgresql

SPEC = JobSpec(owner="t1", model="base", data="queries")


@pytest.fixture(scope="module")
def postgresql_url():
    with postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.extended)])
def store(request, database_url):
    if request.param == "postgresql":
        database = Database(request.getfixturevalue("postgresql_url"))
        with database.write() as session:
            SQLModel.metadata.drop_all(session.connection())
    else:
        database = Database(database_url)
    yield JobStore(database)
    database.close()


def test_a_job_goes_through_its_life_and_every_event_is_kept(store):
    job, new = store.create(SPEC)
    assert new
    assert job.status == "queued"
    held = store.lease(job.id, "w", 60)
    assert (held.status, held.attempt, held.worker) == ("running", 1, "w")
    store.append(job.id, Progressed(attempt=1, progress=Progress(step=3, total=9, loss=0.5)))
    store.append(job.id, Succeeded(attempt=1, result={"verdict": "BETTER"}))
    state = store.get(job.id)
    assert (state.status, state.progress.step, state.result) == ("succeeded", 3, {"verdict": "BETTER"})
    events = store.events(job.id)
    assert [event.event.kind for event in events] == ["created", "leased", "progress", "succeeded"]
    assert [event.sequence for event in events] == [1, 2, 3, 4]
    assert [event.status for event in events] == ["queued", "running", "running", "succeeded"]
    assert [event.sequence for event in store.events(job.id, after=2)] == [3, 4]


def test_an_event_that_changes_nothing_is_not_stored(store):
    job, _ = store.create(SPEC)
    store.lease(job.id, "w", 60)
    before = store.get(job.id)
    assert store.append(job.id, Succeeded(attempt=7, result={})).state == before
    store.append(job.id, CancelRequested())
    store.append(job.id, CancelRequested())
    assert [event.event.kind for event in store.events(job.id)] == ["created", "leased", "cancel_requested"]


def test_one_of_many_workers_gets_the_lease(store):
    job, _ = store.create(SPEC)
    got = []
    start = threading.Barrier(8)

    def take(name):
        start.wait()
        got.append(store.lease(job.id, name, 60))

    threads = [threading.Thread(target=take, args=(f"w{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([state for state in got if state is not None]) == 1


def test_concurrent_events_of_a_job_get_sequences_without_a_gap(store):
    job, _ = store.create(SPEC)
    store.lease(job.id, "w", 60)

    def report(first):
        for step in range(first, 40, 4):
            store.append(job.id, Progressed(attempt=1, progress=Progress(step=step, total=40)))

    threads = [threading.Thread(target=report, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = store.events(job.id)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    steps = [event.event.progress.step for event in events if event.event.kind == "progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 39


def test_a_lease_that_expires_fences_its_worker_out(store):
    job, _ = store.create(SPEC)
    store.lease(job.id, "slow", 0.05)
    assert store.renew(job.id, 1, 0.05).status == "running"
    assert store.expire(job.id, 1, limit=5) is None, "it was renewed"
    time.sleep(0.06)
    assert store.expired() == [(job.id, 1)]
    assert store.expire(job.id, 1, limit=5).commands == ("enqueue",)
    assert store.lease(job.id, "other", 60).attempt == 2
    assert store.renew(job.id, 1, 60) is None
    after = store.append(job.id, Succeeded(attempt=1, result={})).state
    assert (after.status, after.worker, after.result) == ("running", "other", None)
    assert store.append(job.id, Succeeded(attempt=2, result={})).state.status == "succeeded"
    assert store.expired() == []


def test_a_wish_reaches_the_worker_with_its_heartbeat(store):
    job, _ = store.create(SPEC)
    store.lease(job.id, "w", 60)
    store.append(job.id, PauseRequested())
    assert store.renew(job.id, 1, 60).wish == "pause"
    store.append(job.id, Stopped(attempt=1))
    assert store.renew(job.id, 1, 60) is None
    assert store.get(job.id).status == "paused"
    assert store.append(job.id, ResumeRequested()).commands == ("enqueue",)


def test_a_job_is_seen_by_its_owner_and_by_admins(store):
    job, _ = store.create(SPEC)
    assert store.get(job.id, "t1").id == store.get(job.id).id == job.id
    for job_id, owner in ((job.id, "t2"), ("ftjob-none", "t1"), ("../../etc/passwd", None)):
        with pytest.raises(ServiceError) as caught:
            store.get(job_id, owner)
        assert (caught.value.status, caught.value.code) == (404, "job_not_found")


def test_pages_hold_each_job_once_newest_first(store):
    made = [store.create(SPEC)[0].id for _ in range(5)]
    store.create(SPEC.model_copy(update={"owner": "t2"}))
    seen, after, more = [], None, True
    while more:
        page, more = store.list("t1", after=after, limit=2)
        seen += [job.id for job in page]
        after = seen[-1]
    assert seen == made[::-1]
    assert len(store.list(None)[0]) == 6
    store.append(made[0], CancelRequested())
    assert [job.id for job in store.list("t1", statuses=["cancelled"])[0]] == [made[0]]


def test_the_same_request_of_the_same_owner_gives_the_same_job(store):
    first, new = store.create(SPEC, request_digest="d")
    again, repeated = store.create(SPEC, request_digest="d")
    assert (new, repeated, again.id) == (True, False, first.id)
    assert store.create(SPEC, request_digest="e")[1]
    assert store.create(SPEC.model_copy(update={"owner": "t2"}), request_digest="d")[1]


def test_jobs_beyond_the_limits_are_refused(store):
    limits = {"max_per_owner": 2, "max_queued": 3}
    first = store.create(SPEC, **limits)[0]
    store.create(SPEC, **limits)
    with pytest.raises(ServiceError, match="of this token") as caught:
        store.create(SPEC, **limits)
    assert (caught.value.status, caught.value.code) == (429, "too_many_jobs")
    store.create(SPEC.model_copy(update={"owner": "t2"}), **limits)
    with pytest.raises(ServiceError, match="3 queued jobs"):
        store.create(SPEC.model_copy(update={"owner": "t2"}), **limits)
    store.append(first.id, CancelRequested())
    assert store.create(SPEC, **limits)[1]


def test_a_damaged_projection_is_rebuilt_from_the_events(store):
    job, _ = store.create(SPEC)
    store.lease(job.id, "w", 60)
    store.append(job.id, PauseRequested())
    whole = store.get(job.id)
    with store.database.write() as session:
        row = session.exec(select(JobRow)).one()
        row.state, row.status = row.state.replace("pausing", "queued"), "queued"
        session.add(row)
    assert store.get(job.id) != whole
    assert store.rebuild() == 1
    assert store.get(job.id) == whole
    assert store.rebuild() == 0
    assert store.counts() == {"pausing": 1}


def test_sqlite_waits_for_other_writers(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/service.db")
    store = JobStore(database)
    job, _ = store.create(SPEC)
    other = sqlite3.connect(tmp_path / "service.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    release.start()
    assert store.append(job.id, CancelRequested()).state.status == "cancelled"
    release.join()
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    database.close()


def test_processes_that_start_together_create_the_tables_once(store):
    with store.database.write() as session:
        SQLModel.metadata.drop_all(session.connection())
    failures, start = [], threading.Barrier(6)

    def begin():
        start.wait()
        try:
            JobStore(store.database)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.counts() == {}
