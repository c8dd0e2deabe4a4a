"""`executor="ray"`: a process that sends queued jobs to Ray Jobs, where each is trained by a worker for it alone.

The database stays the truth. A Ray Job leases its job, renews the lease, sees wishes and reports as any worker does, so
that everything which holds for local workers holds for it. The dispatcher may be killed at any moment, and there may be
several: a submission's id is the job's id and the number of the attempt, which Ray takes once.
"""

from __future__ import annotations

import logging
import shlex
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed import __version__
from llama_index_lora_embed.core.errors import ClusterError
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.service.jobs.state import HELD, JobState, LeaseExpired
from llama_index_lora_embed.service.jobs.sweep import Sweep

if TYPE_CHECKING:
    from llama_index_lora_embed.service.services import Services

logger = logging.getLogger(__name__)
_LABEL = "lora_embed_job"  # of a Ray Job: the job's id


class RayDispatcher:
    """Submits queued jobs to a Ray cluster, and takes back what Ray has lost before it was leased.

    Args:
        services: Of the process.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: No cluster answers at `ray_address`, or it does not take jobs.
    """

    def __init__(self, services: Services) -> None:
        require("ray")
        address = services.settings.ray_address
        try:
            from ray.exceptions import RayError
            from ray.job_submission import JobSubmissionClient

            try:
                self._client = JobSubmissionClient(address)
            except RayError as error:  # no token, or another one
                raise ConnectionError(str(error)) from error
        except (ConnectionError, RuntimeError, ImportError) as error:
            raise ClusterError(
                f"no Ray Jobs at {address or 'this machine'!r} ({error})",
                "the address of a cluster's dashboard, such as http://head:8265",
                "Install ray[default] there, start it with `ray start --head`, and set LORA_EMBED_RAY_ADDRESS "
                "and, where the cluster asks for a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH.",
            ) from error
        self.services = services
        self.stopping = False
        self._sweep = Sweep(services)

    def run(self) -> None:
        """Submit jobs until SIGTERM or SIGINT; jobs that were submitted go on."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        logger.info("waiting for jobs, which are sent to Ray")
        settings = self.services.settings
        try:
            while not self.stopping:
                if self._sweep.due():
                    self._sweep.run()
                try:
                    # a message only wakes: the database says what is queued
                    self.services.queue.take(min(1.0, settings.sweep_s), lambda: self.stopping)
                    self.dispatch()
                except Exception:  # of the database, or of a cluster that is away for a while
                    logger.exception("jobs could not be sent to Ray; trying again in a second")
                    time.sleep(1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        logger.info("stopped; jobs on Ray go on")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def dispatch(self) -> None:
        """Bring Ray's list of jobs in line with the database, once."""
        jobs = self.services.jobs
        on_ray = {details.submission_id: details for details in self._client.list_jobs() if self._id_of(details)}
        wanted = {}
        for job_id in jobs.queued():
            job = jobs.get(job_id)
            if job.status == "queued":
                wanted[f"{job.id}-{job.attempt + 1}"] = job
        for submission_id, job in wanted.items():
            details = on_ray.get(submission_id)
            if details is None:
                self._submit(submission_id, job)
            elif details.status.is_terminal():
                self._take_back(job, str(details.message or details.status))
        # cancelled or paused before Ray had room for them; what runs sees such wishes itself
        waiting = {i: self._id_of(on_ray[i]) for i in on_ray.keys() - wanted.keys() if on_ray[i].status == "PENDING"}
        known = jobs.known(set(waiting.values()))  # the cluster may have jobs of another service
        for submission_id, job_id in waiting.items():
            if job_id in known and jobs.get(job_id).status not in HELD:
                self._client.stop_job(submission_id)

    @staticmethod
    def _id_of(details: Any) -> str:
        """The id of the job that a Ray Job trains; "" for other Ray Jobs."""
        return str((details.metadata or {}).get(_LABEL, ""))

    def _submit(self, submission_id: str, job: JobState) -> None:
        settings = self.services.settings
        words = ("python", "-m", "llama_index_lora_embed.service.jobs.worker", job.id, __version__)
        try:
            self._client.submit_job(
                entrypoint=shlex.join(words),
                submission_id=submission_id,
                runtime_env={"env_vars": settings.environment()},
                metadata={_LABEL: job.id},
                entrypoint_num_cpus=settings.ray_cpus,
                entrypoint_num_gpus=settings.ray_gpus or None,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):  # another dispatcher was faster
                raise
        logger.info("sent to Ray as %s", submission_id, extra={"job": job.id})

    def _take_back(self, job: JobState, reason: str) -> None:
        """A Ray Job has ended without ever having leased its job: the attempt counts as lost."""
        leased: Any = self.services.jobs.get(job.id)
        if leased.status != "queued" or leased.attempt != job.attempt:
            return  # it has been leased since the list was made
        leased = self.services.jobs.lease(job.id, "ray", self.services.settings.lease_s)
        if leased is not None:
            logger.warning("Ray could not start job %s (attempt %d): %s", job.id, leased.attempt, reason)
            limit = self.services.settings.max_lost_attempts
            self.services.apply(job.id, LeaseExpired(attempt=leased.attempt, limit=limit))
