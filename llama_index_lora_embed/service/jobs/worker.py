"""The worker: a process that takes jobs from the queue and trains one at a time.

`python -m llama_index_lora_embed.service.jobs.worker`, with the settings of the server. It may be killed at any moment:
its lease expires, the job goes back to the queue, and the next attempt goes on from the last checkpoint. With the id
of a job and the version of the package it trains that job and ends: so it is started by Ray Jobs.

Training runs in the main thread, because the package stops at a checkpoint on signals: SIGTERM, which stops the worker,
and SIGINT, which the thread of the heartbeat raises when the job is to be cancelled or paused, has had its time, or is
no longer this worker's. A worker that has lost its lease cannot commit, because its events are of an old attempt.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import filelock
from sqlalchemy.exc import SQLAlchemyError

from llama_index_lora_embed import __version__
from llama_index_lora_embed.config import LOCK_NAME, MANIFEST_NAME
from llama_index_lora_embed.core.errors import ConfigError, DeviceMemoryError, LoraEmbedError
from llama_index_lora_embed.service.jobs.order import config_of, without_paths
from llama_index_lora_embed.service.jobs.ray_jobs import RayDispatcher
from llama_index_lora_embed.service.jobs.report import write_report
from llama_index_lora_embed.service.jobs.state import (
    Checkpointed,
    Event,
    Failed,
    JobError,
    JobState,
    Progress,
    Progressed,
    Stopped,
    Succeeded,
)
from llama_index_lora_embed.service.jobs.sweep import Sweep
from llama_index_lora_embed.service.logs import configure_logging
from llama_index_lora_embed.service.settings import ServiceSettings

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llama_index_lora_embed.service.services import Services

logger = logging.getLogger(__name__)
_PROGRESS_S = 1.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL_TEXTS = ("No space left on device", "File too large", "Disk quota exceeded")


class Worker:
    """A worker on one accelerator.

    Args:
        services: Of the process.
        exclusive: Whether no other worker of this machine may use the same accelerator; on Ray, Ray sees to that.

    Raises:
        ConfigError: Another worker of this machine uses the same accelerator.
    """

    def __init__(self, services: Services, *, exclusive: bool = True) -> None:
        self.services = services
        self.settings = services.settings
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.stopping = False
        self._training = False
        self._sweep = Sweep(services)
        device = (self.settings.device or "auto").replace(":", "-")
        self._lock = filelock.FileLock(services.settings.folder / f"worker-{socket.gethostname()}-{device}.lock")
        try:
            if exclusive:
                self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ConfigError(
                f"another worker of this machine on the device {self.settings.device or 'that torch chooses'!r}",
                "one worker for each accelerator",
                "Stop it, or set LORA_EMBED_DEVICE to another device, such as cuda:1.",
            ) from error

    def run(self, jobs: int | None = None) -> None:
        """Take jobs until SIGTERM or SIGINT.

        Args:
            jobs: Return after so many attempts; None never does.
        """
        with self._signals():
            _load_training()
            logger.info("worker %s waits for jobs", self.name)
            while not self.stopping and jobs != 0:
                if self._sweep.due():
                    self._sweep.run()
                try:
                    job_id = self.services.queue.take(min(1.0, self.settings.sweep_s), lambda: self.stopping)
                    if job_id is None or self.stopping or self._is_trained_elsewhere(job_id):
                        continue  # a message that is dropped here is found again by the sweep
                    job = self.services.jobs.lease(job_id, self.name, self.settings.lease_s)
                except Exception:
                    logger.exception("no job could be taken; trying again in a second")
                    time.sleep(1)
                    continue
                if job is not None:
                    self.attempt(job)
                    jobs = None if jobs is None else jobs - 1
        self._lock.release()
        logger.info("worker %s has stopped", self.name)

    def run_one(self, job_id: str) -> None:
        """Train one job, unless it is not queued any more."""
        with self._signals():
            _load_training()
            while not self.stopping:
                if self._is_trained_elsewhere(job_id):
                    time.sleep(1)
                    continue
                job = self.services.jobs.lease(job_id, self.name, self.settings.lease_s)
                if job is not None:
                    self.attempt(job)
                return

    def attempt(self, job: JobState) -> None:
        """Train a job that was leased to this worker, and report how it ended."""
        log = {"job": job.id, "attempt": job.attempt}
        logger.info("training begins", extra=log)
        with Heartbeat(self, job) as heartbeat:
            event: Event
            try:
                if not (self.settings.models_dir / job.id / MANIFEST_NAME).exists():
                    self._train(job, heartbeat)
                # also of an earlier attempt, whose worker was killed before it could report its end
                event = Succeeded(attempt=job.attempt, result=result_of(self.settings, job.id))
            except KeyboardInterrupt:
                if heartbeat.reason == "time_limit":
                    event = Failed(attempt=job.attempt, error=self._time_limit())
                else:
                    event = Stopped(attempt=job.attempt)
            except Exception as error:
                if self._is_trained_elsewhere(job.id):
                    event = Stopped(attempt=job.attempt)
                else:
                    logger.exception("training failed", extra=log)
                    event = Failed(attempt=job.attempt, error=self._error_of(job, error))
            state = self._report(job, event, heartbeat)
        if state is not None:
            logger.info("the job is %s", state.status, extra=log)
        gc.collect()  # the model, before the next one is loaded

    def _train(self, job: JobState, heartbeat: Heartbeat) -> None:
        from llama_index_lora_embed.engines.run import run_finetune

        config = config_of(job, self.settings)
        callback = progress_callback(self.services, job)
        with self._interruptible():
            if heartbeat.reason or self.stopping:
                raise KeyboardInterrupt
            result = run_finetune(config, callbacks=[callback])
        write_report(result, self.settings, job.id)

    def _is_trained_elsewhere(self, job_id: str) -> bool:
        """Whether a process that has lost the job's lease is still in its run directory, and will stop soon."""
        known = self.services.jobs.known([job_id])  # a message is no id to build a path of
        run_dir = self.settings.models_dir / f"{job_id}.run"
        if not known or not run_dir.exists():
            return False
        try:
            with filelock.FileLock(run_dir / LOCK_NAME, timeout=0):
                return False
        except filelock.Timeout:
            return True

    def _report(self, job: JobState, event: Event, heartbeat: Heartbeat) -> JobState | None:
        """Store the end of an attempt; again and again while the database refuses and the lease may be held."""
        while heartbeat.reason != "lost":
            try:
                return self.services.apply(job.id, event)
            except SQLAlchemyError as error:
                logger.warning("the end of job %s cannot be stored yet: %s", job.id, error)
                time.sleep(min(1.0, self.settings.heartbeat_s))
        logger.warning("the lease of job %s (attempt %d) was lost; what it did is discarded", job.id, job.attempt)
        return None

    def _time_limit(self) -> JobError:
        limit = self.settings.max_job_seconds
        return JobError(
            code="time_limit",
            message=f"The job has trained for {limit:g} s, which is the service's limit. Its checkpoint is kept.",
        )

    def _error_of(self, job: JobState, error: BaseException) -> JobError:
        """What clients are told of an error: no tracebacks and no folders of this machine."""
        if _is_disk_full(error):
            return JobError(
                code="disk_full",
                message="The service's disk is full. Earlier checkpoints are kept: tell the operator, then resume the "
                "job.",
            )
        if isinstance(error, LoraEmbedError):
            message = str(error)
            try:
                names = {place: name for name, place in self.settings.allowed_models.items()}
                message = without_paths(message, config_of(job, self.settings), names)
            except LoraEmbedError:  # it is the model that is not allowed any more
                pass
            code = "out_of_memory" if isinstance(error, DeviceMemoryError) else "invalid_data"
            return JobError(code=code, message=message.replace(str(self.settings.folder), "<data>"))
        return JobError(
            code="internal_error", message=f"Training failed unexpectedly ({type(error).__name__}); the log says why."
        )

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Within it a signal raises KeyboardInterrupt."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not (number == signal.SIGINT and self._own_signal):
            self.stopping = True
        self._own_signal = False
        if self._training:
            self._training = False  # a second one must not interrupt what follows
            raise KeyboardInterrupt

    _own_signal = False

    def interrupt(self) -> None:
        """Have the training stop after its step, from another thread."""
        if self._training:
            self._own_signal = True
            signal.raise_signal(signal.SIGINT)  # Python runs the handler in the main thread


class Heartbeat:
    """Renews a lease in a thread while the job is trained, and interrupts the training when it is to stop.

    Attributes:
        reason: Why it is to stop: "lost" (the lease), "wish" (of a client), "time_limit"; None while it is not.
    """

    def __init__(self, worker: Worker, job: JobState) -> None:
        self.reason: str | None = None
        self._worker, self._job = worker, job
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._renewed = time.monotonic()
        self._deadline = self._renewed + worker.settings.max_job_seconds - job.seconds

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        settings = self._worker.settings
        while True:
            left = self._deadline - time.monotonic()
            if self._ended.wait(max(0.01, min(settings.heartbeat_s, left)) if self.reason is None else 0.5):
                return
            reason = self._beat()
            if reason is not None and self.reason in (None, "wish", "time_limit"):
                first, self.reason = self.reason is None, reason if reason == "lost" else self.reason or reason
                if first:
                    self._worker.interrupt()

    def _beat(self) -> str | None:
        settings = self._worker.settings
        try:
            state = self._worker.services.jobs.renew(self._job.id, self._job.attempt, settings.lease_s)
        except Exception as error:  # a database that cannot be reached
            logger.warning("the lease of job %s could not be renewed: %s", self._job.id, error)
            if time.monotonic() - self._renewed > settings.lease_s:
                return "lost"
        else:
            if state is None:
                return "lost"
            self._renewed = time.monotonic()
            if state.wish is not None:
                return "wish"
        return "time_limit" if time.monotonic() >= self._deadline else None


def _load_training() -> None:
    """Import what training needs, which takes seconds in which heartbeats are late, before there is a lease to renew.

    What is imported is taken out of garbage collection, which each training starts several times and which stops all
    threads meanwhile.
    """
    import llama_index_lora_embed.engines.run
    import llama_index_lora_embed.training.train  # noqa: F401

    gc.collect()
    gc.freeze()


def progress_callback(services: Services, job: JobState) -> TrainerCallback:
    """A callback of the trainer that reports progress about once a second, and every checkpoint."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.loss: float | None = None
            self.learning_rate: float | None = None
            self.next = 0.0
            self.earlier = self.total = self.step = 0  # steps of earlier rounds of mining; of this one

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step < self.step:
                self.earlier += self.total
            self.total = state.max_steps

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.loss = float(logs["loss"])
                self.learning_rate = float(logs.get("learning_rate", self.learning_rate or 0.0))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.step = state.global_step
            if self.step >= self.total or time.monotonic() >= self.next:
                self.next = time.monotonic() + _PROGRESS_S
                progress = Progress(
                    step=self.earlier + self.step,
                    total=self.earlier + self.total,
                    loss=self.loss,
                    learning_rate=self.learning_rate,
                    epoch=None if state.epoch is None else round(float(state.epoch), 3),
                )
                self.store(Progressed(attempt=job.attempt, progress=progress))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if (Path(args.output_dir) / f"checkpoint-{state.global_step}").exists():  # not where the disk was full
                self.store(Checkpointed(attempt=job.attempt, step=self.earlier + state.global_step))

        def store(self, event: Event) -> None:
            try:
                services.jobs.append(job.id, event)
            except SQLAlchemyError as error:  # training goes on; the heartbeat knows when the lease is lost
                logger.warning("progress of job %s could not be stored: %s", job.id, error)

    return Reporter()


def result_of(settings: ServiceSettings, job_id: str) -> dict[str, Any]:
    """The result of a job from the manifest of its adapter: the same, whichever attempt reports it.

    Returns:
        `fingerprint`, `verdict`, `summary`, `metrics` by "base" and "tuned", `best_step`, `max_seq_length`, `dataset`
        (digest, size and origins of the training data).
    """
    from llama_index_lora_embed.evaluation.verdict import Verdict

    manifest = json.loads((settings.models_dir / job_id / MANIFEST_NAME).read_text(encoding="utf-8"))
    summary = manifest["verdict"]
    return {
        "fingerprint": manifest["fingerprint"],
        "verdict": next((verdict.value for verdict in Verdict if summary.startswith(verdict.value)), None),
        "summary": summary,
        "metrics": manifest["metrics"],
        "best_step": manifest["best_step"],
        "max_seq_length": manifest["max_seq_length"],
        "dataset": manifest["dataset"],
    }


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is the cause, also of errors of torch and safetensors, which say so only in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if any(text in str(error) for text in _DISK_FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(job_id: str | None = None, version: str | None = None) -> None:
    """Run a worker with the settings of the environment.

    Args:
        job_id: Train this job alone.
        version: Of the package that has sent the job; another one here is an error.
    """
    from llama_index_lora_embed.service.services import Services

    settings = ServiceSettings()
    configure_logging(settings)
    if version not in (None, __version__):
        sys.exit(f"llama-index-lora-embed {__version__} on this node, but {version} at the service: install the same")
    with Services(settings) as services:
        if job_id is not None:
            Worker(services, exclusive=False).run_one(job_id)
        elif settings.executor == "ray":
            RayDispatcher(services).run()
        else:
            Worker(services).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
