"""What the dispatcher makes of Ray's list of jobs; test_ray_jobs.py has the real Ray."""

from types import SimpleNamespace

from llama_index_lora_embed.service.jobs.ray_jobs import RayDispatcher
from llama_index_lora_embed.service.jobs.state import CancelRequested, JobSpec


class Status(str):
    """A status of a Ray Job."""

    __slots__ = ()

    def is_terminal(self):
        return self in ("FAILED", "STOPPED", "SUCCEEDED")


class FakeRay:
    """Ray's list of jobs, as `JobSubmissionClient` gives it."""

    def __init__(self):
        self.jobs, self.stopped = {}, []

    def add(self, submission_id, status, job_id):
        self.jobs[submission_id] = SimpleNamespace(
            submission_id=submission_id, status=Status(status), message="no room", metadata={"lora_embed_job": job_id}
        )

    def list_jobs(self):
        other = SimpleNamespace(submission_id=None, status=Status("PENDING"), message="", metadata=None)
        return [*self.jobs.values(), other]

    def submit_job(self, *, submission_id, metadata, **_):
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.add(submission_id, "PENDING", metadata["lora_embed_job"])

    def stop_job(self, submission_id):
        self.stopped.append(submission_id)


def dispatcher_of(services, ray):
    made = RayDispatcher.__new__(RayDispatcher)
    made.services, made._client = services, ray
    return made


def queued(services):
    return services.jobs.create(JobSpec(owner="t", model="tiny", data="queries"))[0].id


def test_a_queued_job_is_submitted_once_for_each_attempt(services):
    job_id, ray = queued(services), FakeRay()
    dispatcher = dispatcher_of(services, ray)
    dispatcher.dispatch()
    dispatcher.dispatch()
    assert list(ray.jobs) == [f"{job_id}-1"]
    assert services.jobs.get(job_id).status == "queued", "it leases for itself"


def test_a_ray_job_that_ended_before_its_lease_is_a_lost_attempt(services):
    job_id, ray = queued(services), FakeRay()
    dispatcher = dispatcher_of(services, ray)
    limit = services.settings.max_lost_attempts
    for attempt in range(1, limit + 1):
        dispatcher.dispatch()
        assert f"{job_id}-{attempt}" in ray.jobs
        ray.add(f"{job_id}-{attempt}", "FAILED", job_id)
        dispatcher.dispatch()
    job = services.jobs.get(job_id)
    assert (job.status, job.error.code, job.attempt) == ("failed", "worker_lost", limit)
    dispatcher.dispatch()
    assert len(ray.jobs) == limit, "it is not tried again"


def test_what_was_cancelled_before_it_had_room_is_stopped_and_jobs_of_others_are_not(services):
    job_id, ray = queued(services), FakeRay()
    dispatcher = dispatcher_of(services, ray)
    dispatcher.dispatch()
    ray.add("ftjob-of-another-service-1", "PENDING", "ftjob-of-another-service")
    leased = queued(services)
    services.jobs.lease(leased, "worker", 60)
    ray.add(f"{leased}-1", "PENDING", leased)  # the list is older than the lease
    services.apply(job_id, CancelRequested())
    dispatcher.dispatch()
    assert ray.stopped == [f"{job_id}-1"]
