"""OpenAI's fine-tuning jobs: /v1/fine_tuning/jobs. They are the jobs of /v1/finetune."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.service.api.dependencies import Reader, ServicesOf, Trainer
from llama_index_lora_embed.service.api.openai_files import page
from llama_index_lora_embed.service.data import Rows, file_rows
from llama_index_lora_embed.service.errors import ServiceError, not_found
from llama_index_lora_embed.service.jobs.order import order
from llama_index_lora_embed.service.jobs.state import (
    CancelRequested,
    Checkpointed,
    Created,
    Event,
    Failed,
    JobState,
    LeaseExpired,
    PauseRequested,
    Progressed,
    ResumeRequested,
    Succeeded,
)
from llama_index_lora_embed.service.jobs.tables import StoredEvent
from llama_index_lora_embed.service.limits import StrictRoute
from llama_index_lora_embed.service.models import fine_tuned_model
from llama_index_lora_embed.service.services import Services

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["OpenAI: fine-tuning"], route_class=StrictRoute)

_STATUSES = {"pausing": "running", "cancelling": "running"}
"""Statuses that OpenAI has no word for: the worker is still at work."""
_DEFAULTS = FinetuneConfig.model_fields["training"].get_default(call_default_factory=True)
_METADATA = re.compile(r"metadata\[(.{1,64})\]")
_SEQUENCE = 24  # digits in the ids of events and checkpoints

Auto = Literal["auto"]
Limit = Annotated[int, Query(ge=1, le=100)]


class Hyperparameters(BaseModel):
    """OpenAI's; "auto" is the package's default."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] | None = None
    """Passes over the training data."""
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] | None = None
    """Queries per step."""
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100)] | None = None
    """Factor of the package's default learning rate."""

    def arguments(self) -> dict[str, Any]:
        """Fields of `FinetuneConfig`."""
        chosen = {name: value for name, value in self if value not in (None, "auto")}
        if (multiplier := chosen.pop("learning_rate_multiplier", None)) is not None:
            chosen["learning_rate"] = multiplier * _DEFAULTS.learning_rate
        if (epochs := chosen.pop("n_epochs", None)) is not None:
            chosen["epochs"] = epochs
        return chosen


class Supervised(BaseModel):
    """The settings of `Method`."""

    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    """How to train; triplets are data of "supervised", too."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class CreateJob(BaseModel):
    """The body of a new job."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str
    """Name of a base model."""
    training_file: str
    """Id of an uploaded file."""
    validation_file: str | None = None
    """Id of an uploaded file; where there is none, a tenth of the training queries is held out."""
    method: Method | None = None
    """"supervised", with its hyperparameters."""
    hyperparameters: Hyperparameters | None = None
    """The same, as older clients send them."""
    suffix: str | None = None
    """Part of the name of the tuned model."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Random seed."""
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    """Up to 16 labels of the client's own."""
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    """None are supported."""


@router.post("")
def create(body: CreateJob, caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Create a job; the same request again within two minutes gives the same job."""
    chosen = body.method.supervised.hyperparameters if body.method and body.method.supervised else None
    arguments = (chosen or body.hyperparameters or Hyperparameters()).arguments()
    if body.seed is not None:
        arguments["seed"] = body.seed
    problems: list[str] = []
    files = {name: value for name in ("training_file", "validation_file") if (value := getattr(body, name)) is not None}
    rows = {name: _rows(services, name, value, caller.owner, problems) for name, value in files.items()}
    job, _ = order(
        services,
        owner=caller.id,
        model=body.model,
        training=rows["training_file"],
        validation=rows.get("validation_file"),
        arguments=arguments,
        suffix=body.suffix or None,
        metadata=body.metadata,
        extra=files,
        request_digest=hashlib.sha256(json.dumps(body.model_dump(mode="json"), sort_keys=True).encode()).hexdigest(),
        problems=problems,
    )
    return shown(job)


@router.get("")
def jobs(
    request: Request, caller: Reader, services: ServicesOf, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """The caller's jobs, newest first; `metadata[key]=value` selects those with a label."""
    labels = {m[1]: value for name, value in request.query_params.items() if (m := _METADATA.fullmatch(name))}
    found: list[JobState] = []
    more = True
    while more and len(found) <= limit:  # labels are in no column of the table
        some, more = services.jobs.list(caller.owner, after=after, limit=100)
        found += [job for job in some if labels.items() <= job.spec.metadata.items()]
        after = some[-1].id if some else None
    return page([shown(job) for job in found[:limit]], len(found) > limit)


@router.get("/{job_id}")
def job(job_id: str, caller: Reader, services: ServicesOf) -> dict[str, Any]:
    """A job."""
    return shown(services.jobs.get(job_id, caller.owner))


@router.post("/{job_id}/cancel")
def cancel(job_id: str, caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Cancel a job; it is "running" until its worker has stopped."""
    services.jobs.get(job_id, caller.owner)
    return shown(services.apply(job_id, CancelRequested()))


@router.post("/{job_id}/pause")
def pause(job_id: str, caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Stop a job at a checkpoint; it is "running" until its worker has stopped."""
    services.jobs.get(job_id, caller.owner)
    return shown(services.apply(job_id, PauseRequested()))


@router.post("/{job_id}/resume")
def resume(job_id: str, caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Continue a job from its checkpoint."""
    services.jobs.get(job_id, caller.owner)
    return shown(services.apply(job_id, ResumeRequested()))


@router.get("/{job_id}/events")
def events(
    job_id: str, caller: Reader, services: ServicesOf, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """What has happened to a job, newest first."""
    job = services.jobs.get(job_id, caller.owner)
    found, more = services.jobs.history(job_id, before=_sequence("ftevent-", after), limit=limit)
    return page([_event(job, stored) for stored in found], more)


@router.get("/{job_id}/checkpoints")
def checkpoints(
    job_id: str, caller: Reader, services: ServicesOf, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """The checkpoints of a job, newest first; once it has succeeded, the last two can be embedded with."""
    job = services.jobs.get(job_id, caller.owner)
    before = _sequence("ftckpt-", after)
    found, more = services.jobs.history(job_id, before=before, limit=limit, kinds=["checkpointed"])
    losses = {}
    for stored in services.jobs.history(job_id, limit=10_000, kinds=["progress"])[0]:
        assert isinstance(stored.event, Progressed)
        losses[stored.event.progress.step] = stored.event.progress.loss
    return page([_checkpoint(job, stored, losses) for stored in found], more)


def shown(job: JobState) -> dict[str, Any]:
    """A job as OpenAI's clients know it."""
    arguments = job.spec.arguments
    rate = arguments.get("learning_rate")
    hyperparameters = {
        "n_epochs": arguments.get("epochs", "auto"),
        "batch_size": arguments.get("batch_size", "auto"),
        "learning_rate_multiplier": "auto" if rate is None else rate / _DEFAULTS.learning_rate,
    }
    of_data = job.error is not None and job.error.code == "invalid_data"
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created),
        "finished_at": None if job.ended is None else int(job.ended),
        "estimated_finish": None,
        "model": job.spec.model,
        "fine_tuned_model": fine_tuned_model(job) if job.has_model else None,
        "organization_id": job.spec.owner,
        "status": _STATUSES.get(job.status, job.status),
        "training_file": job.spec.extra.get("training_file", ""),
        "validation_file": job.spec.extra.get("validation_file"),
        "result_files": [],
        "trained_tokens": None,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "user_provided_suffix": job.spec.suffix,
        "seed": arguments.get("seed", _DEFAULTS.seed),
        "metadata": job.spec.metadata,
        "integrations": [],
        "error": job.error and {**job.error.model_dump(), "param": "training_file" if of_data else None},
    }


def _rows(services: Services, name: str, file_id: str, owner: str | None, problems: list[str]) -> Rows:
    """The rows of an uploaded file; none if there is no such file, which is then a problem."""
    try:
        return file_rows(services.files.path(services.files.get(file_id, owner)), name, problems)
    except ServiceError as error:
        problems.append(f"{name}={file_id!r:.80}: expected {error.expected}")
        return ()


def _sequence(prefix: str, after: str | None) -> int | None:
    """The place of an event or checkpoint from its id."""
    if after is None:
        return None
    digits = after.removeprefix(prefix)
    if not re.fullmatch(rf"[0-9]{{{_SEQUENCE}}}", digits) or int(digits) >= 2**63:
        raise not_found("event", after, "Leave `after` out for the first page.")
    return int(digits)


def _event(job: JobState, stored: StoredEvent) -> dict[str, Any]:
    message, data = _message(job, stored.event)
    kind = stored.event.kind
    return {
        "id": f"ftevent-{stored.sequence:0{_SEQUENCE}d}",
        "object": "fine_tuning.job.event",
        "created_at": int(stored.event.time),
        "level": "error" if kind == "failed" else "warn" if kind == "lease_expired" else "info",
        "message": message,
        "type": "metrics" if data else "message",
        "data": data,
    }


def _message(job: JobState, event: Event) -> tuple[str, Mapping[str, Any]]:
    """What an event is called, and the figures in it."""
    if isinstance(event, Progressed):
        now = event.progress
        loss = "" if now.loss is None else f": training loss={now.loss:.4f}"
        data = {"step": now.step, "total_steps": now.total, "train_loss": now.loss, "learning_rate": now.learning_rate}
        return f"Step {now.step}/{now.total}{loss}", data
    if isinstance(event, Created):
        return f"Created fine-tuning job: {job.id}", {}
    if isinstance(event, Checkpointed):
        return f"Checkpoint created at step {event.step}", {}
    if isinstance(event, Succeeded):
        return f"The job has successfully completed. New model: {fine_tuned_model(job)}", {}
    if isinstance(event, Failed):
        return f"The job failed: {event.error.message}", {}
    if isinstance(event, LeaseExpired):
        return "A worker was lost; the job goes on from its last checkpoint", {}
    words = {
        "leased": "Fine-tuning job started",
        "stopped": "The worker has stopped at a checkpoint",
        "pause_requested": "The job is to be paused",
        "resume_requested": "The job is to go on",
        "cancel_requested": "The job is to be cancelled",
        "run_deleted": "Training data and checkpoints were deleted",
        "model_deleted": "The model was deleted",
    }
    return words[event.kind], {}


def _checkpoint(job: JobState, stored: StoredEvent, losses: Mapping[int, float | None]) -> dict[str, Any]:
    event = stored.event
    assert isinstance(event, Checkpointed)
    return {
        "id": f"ftckpt-{stored.sequence:0{_SEQUENCE}d}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(event.time),
        "fine_tuned_model_checkpoint": f"{fine_tuned_model(job)}:ckpt-step-{event.step}",
        "fine_tuning_job_id": job.id,
        "step_number": event.step,
        "metrics": {"step": event.step, "train_loss": losses.get(event.step)},
    }
