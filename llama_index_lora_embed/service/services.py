"""`Services`: what the routes and the workers share, opened once per process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from llama_index_lora_embed.core.errors import OutputDirectoryError
from llama_index_lora_embed.service.database import Database
from llama_index_lora_embed.service.embedding import Batcher
from llama_index_lora_embed.service.files import FileStore
from llama_index_lora_embed.service.jobs.queue import JobQueue
from llama_index_lora_embed.service.jobs.state import Command, Event, JobSpec, JobState
from llama_index_lora_embed.service.jobs.store import JobStore
from llama_index_lora_embed.service.limits import Rates
from llama_index_lora_embed.service.models import Models
from llama_index_lora_embed.service.security import Tokens
from llama_index_lora_embed.service.settings import ServiceSettings

logger = logging.getLogger(__name__)


class Services:
    """Database, queue and folders of the service.

    Routes get it as `Annotated[Services, Depends(services)]` (`service.api.dependencies`).

    Args:
        settings: Of the service.

    Raises:
        OutputDirectoryError: The data folder cannot be written.
        ConfigError: A URL is wrong.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        try:
            settings.folder.parent.mkdir(parents=True, exist_ok=True)
            settings.folder.mkdir(mode=0o700, exist_ok=True)  # training data is nobody else's to read
            for folder in (settings.models_dir, settings.jobs_dir):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputDirectoryError(
                f"the data folder {str(settings.folder)!r}, which cannot be written ({error})",
                "a folder for databases, files and adapters",
                "Set LORA_EMBED_DATA_DIR to another one, or make this one writable.",
            ) from error
        self.database = Database(settings.database)
        self.jobs = JobStore(self.database)
        self.files = FileStore(self.database, settings)
        self.queue = JobQueue(settings)
        self.tokens = Tokens(self.database)
        self.rates = Rates(settings.requests_per_minute)
        self.models = Models(self)
        self.batcher = Batcher(
            wait_s=settings.batch_wait_s,
            max_models=settings.max_loaded_models,
            max_adapters=settings.max_loaded_adapters,
            device=settings.device,
        )

    def submit(self, spec: JobSpec, *, job_id: str, request_digest: str | None = None) -> tuple[JobState, bool]:
        """Create a job within the limits of the settings and enqueue it; see `JobStore.create`."""
        state, new = self.jobs.create(
            spec,
            job_id=job_id,
            request_digest=request_digest,
            max_per_owner=self.settings.max_jobs_per_token,
            max_queued=self.settings.max_queued_jobs,
        )
        if new:
            self.carry_out(state.id, ("enqueue",))
        return state, new

    def apply(self, job_id: str, event: Event) -> JobState:
        """Store an event and do what follows from it; raises as `JobStore.append`."""
        decision = self.jobs.append(job_id, event)
        self.carry_out(job_id, decision.commands)
        return decision.state

    def carry_out(self, job_id: str, commands: Sequence[Command]) -> None:
        """Do what a decision commands; the sweep makes up for what fails here."""
        for command in commands:
            try:
                {"enqueue": self.queue.put, "delete_run": self.delete_run, "delete_model": self.delete_model}[command](
                    job_id
                )
            except Exception as error:  # the event is stored, and a queue may be down for a while
                logger.warning("%s of job %s is left to the next sweep: %s", command, job_id, error)

    def delete_run(self, job_id: str) -> None:
        """Delete training data, checkpoints and log of a job; its adapter stays."""
        import shutil

        run_dir = self.settings.models_dir / f"{job_id}.run"
        for folder in (self.settings.jobs_dir / job_id, run_dir, *run_dir.parent.glob(f"{job_id}.run.*")):
            shutil.rmtree(folder, ignore_errors=True)

    def delete_model(self, job_id: str) -> None:
        """Delete adapter and report of a job."""
        import shutil

        shutil.rmtree(self.settings.models_dir / job_id, ignore_errors=True)
        self.settings.report(job_id).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the connections."""
        self.batcher.close()
        self.queue.close()
        self.database.close()

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
