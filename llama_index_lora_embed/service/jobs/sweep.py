"""The sweep: what server and workers do every few seconds, so that nothing that was lost stays lost."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.jobs.order import sweep_folders
from llama_index_lora_embed.service.jobs.state import RunDeleted

if TYPE_CHECKING:
    from llama_index_lora_embed.service.services import Services

logger = logging.getLogger(__name__)
_RETENTION_S = 600.0


class Sweep:
    """Takes expired leases back, enqueues what the queue has lost, and deletes what is too old.

    Args:
        services: Of the process.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self._next = self._next_retention = 0.0

    def due(self) -> bool:
        """Whether `sweep_s` seconds have passed since the last one."""
        return time.monotonic() >= self._next

    def run(self) -> None:
        """Sweep once; an error is logged, and the next sweep tries again."""
        settings = self.services.settings
        self._next = time.monotonic() + settings.sweep_s
        try:
            self.expire_leases()
            self.enqueue_lost()
            if time.monotonic() >= self._next_retention:
                self._next_retention = time.monotonic() + _RETENTION_S
                self.delete_old()
        except Exception:  # a database or a disk that fails for a while must not end the process
            logger.exception("the sweep failed; the next one is in %g s", settings.sweep_s)

    def expire_leases(self) -> None:
        """Send jobs back to the queue whose worker has not been heard of."""
        store = self.services.jobs
        for job_id, attempt in store.expired():
            decision = store.expire(job_id, attempt, self.services.settings.max_lost_attempts)
            if decision is not None:
                logger.warning(
                    "the lease of job %s (attempt %d) expired; it is %s", job_id, attempt, decision.state.status
                )
                self.services.carry_out(job_id, decision.commands)

    def enqueue_lost(self) -> None:
        """Enqueue the queued jobs again where there are fewer messages, because some were lost; others are harmless."""
        queued = self.services.jobs.queued()
        if len(self.services.queue) < len(queued):
            for job_id in queued:
                self.services.queue.put(job_id)

    def delete_old(self) -> None:
        """Delete old files, and data and checkpoints of jobs that ended long ago; those of live jobs stay."""
        services, settings, now = self.services, self.services.settings, time.time()
        if settings.keep_files_s is not None:
            for file_id in services.files.older_than(now - settings.keep_files_s):
                try:
                    services.files.delete(file_id)
                except ServiceError:  # another process was faster
                    continue
        if settings.keep_runs_s is not None:
            for job_id in services.jobs.ended_before(now - settings.keep_runs_s):
                if services.apply(job_id, RunDeleted()).run_deleted:
                    services.delete_run(job_id)  # again, if a kill came between the event and the deletion
        for job_id in services.jobs.without_model():
            services.delete_model(job_id)  # again, as above
        sweep_folders(services)


class SweepThread(threading.Thread):
    """Sweeps in the background, for a server.

    Args:
        services: Of the process.
    """

    def __init__(self, services: Services) -> None:
        super().__init__(name="sweep", daemon=True)
        self._sweep = Sweep(services)
        self._seconds = services.settings.sweep_s
        self._ended = threading.Event()

    def run(self) -> None:
        """Sweep until `stop`."""
        while not self._ended.wait(self._seconds):
            self._sweep.run()

    def stop(self) -> None:
        """End the thread after the sweep it is in."""
        self._ended.set()
        self.join()
