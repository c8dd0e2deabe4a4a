"""The service's own face of jobs: create, list, get, cancel, pause, resume, and their events as a stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import anyio
from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from llama_index_lora_embed.service.api.dependencies import Reader, ServicesOf, Trainer
from llama_index_lora_embed.service.data import Rows, file_rows, inline_rows
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.jobs.order import order
from llama_index_lora_embed.service.jobs.state import (
    ENDED,
    CancelRequested,
    JobState,
    PauseRequested,
    Progressed,
    ResumeRequested,
    Status,
)
from llama_index_lora_embed.service.jobs.tables import StoredEvent
from llama_index_lora_embed.service.limits import StrictRoute
from llama_index_lora_embed.service.models import fine_tuned_model
from llama_index_lora_embed.service.services import Services

router = APIRouter(prefix="/v1/finetune", tags=["finetune"], route_class=StrictRoute)
_POLL_S = 0.5
_ASK_S = 5.0  # PostgreSQL may show an event after a later one, whose number was seen already
_RETRY_MS = 2000
ShownStatus = Literal["queued", "running", "pausing", "paused", "cancelling", "cancelled", "completed", "failed"]
"""A job's status in the words of this face, in which OpenAI's "succeeded" is "completed"."""
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class FinetuneRequest(BaseModel):
    """A job to create: a model, data, and any of `order.ALLOWED_ARGUMENTS` beside them, by their own names."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str | None = None
    """Name of a base model that the service allows; none takes the only one, or the first."""
    pairs: list[Any] | None = None
    """Rows `{"query", "passage"}` or `[query, passage]`, all of them with a `score` from 0 to 1, or none."""
    triplets: list[Any] | None = None
    """Rows `{"query", "passage", "negative", "score"}`, of which the score is the grade of the passage."""
    nodes: list[Any] | None = None
    """Texts, rows `{"text", "id", "metadata"}`, or LlamaIndex's nodes; queries are generated for them."""
    training_file: str | None = None
    """Id of an uploaded file, instead of rows."""
    validation_pairs: list[Any] | None = None
    """As `pairs`, for validation; without any, a tenth of the training queries is held out."""
    validation_file: str | None = None
    """Id of an uploaded file, instead of `validation_pairs`."""
    query_origin: Literal["human", "llm"] | None = None
    """Who wrote the queries, which the verdict depends on: only queries of people are evidence for people's queries."""
    suffix: str | None = None
    """Part of the tuned model's name."""
    metadata: Annotated[Metadata, Field(max_length=16)] = {}
    """Up to 16 labels of the client's own."""


class Job(BaseModel):
    """A job as clients see it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    job_id: str
    """Its id."""
    status: ShownStatus
    """queued, running, pausing, paused, cancelling, cancelled, completed or failed."""
    model: str
    """Name of the base model."""
    fine_tuned_model: str | None
    """Name of the tuned model, once there is one."""
    progress: dict[str, Any]
    """`step` of `total`, and `fraction` from 0 to 1."""
    metrics: dict[str, Any]
    """`loss` and `learning_rate` of training; once it has completed, metrics of `base` and `tuned`."""
    verdict: str | None
    """BETTER, LIKELY BETTER, NO CLEAR DIFFERENCE, WORSE or NOT EVALUATED."""
    summary: str | None
    """The verdict in a sentence."""
    error: dict[str, Any] | None
    """`code` and `message` of a job that failed."""
    attempt: int
    """How often a worker has taken it."""
    checkpoint: int | None
    """Step of the newest checkpoint, from which a resumed job goes on."""
    arguments: dict[str, Any]
    """What the client chose."""
    metadata: dict[str, str]
    """The client's labels."""
    created_at: float
    """Seconds since 1970."""
    started_at: float | None
    """Seconds since 1970."""
    ended_at: float | None
    """Seconds since 1970."""


class JobList(BaseModel):
    """A page of jobs."""

    data: list[Job]
    """Newest first."""
    has_more: bool
    """Whether there are older ones; `?after=<last job_id>` gives them."""


def shown(job: JobState) -> Job:
    """A job as clients see it."""
    result, progress = job.result or {}, job.progress
    metrics: dict[str, Any] = dict(result.get("metrics", {}))
    if progress is not None:
        metrics = {"loss": progress.loss, "learning_rate": progress.learning_rate, **metrics}
    done = {} if progress is None else progress.model_dump(include={"step", "total", "epoch"})
    fraction = 1.0 if job.status == "succeeded" else progress.step / max(1, progress.total) if progress else 0.0
    return Job(
        job_id=job.id,
        status=_shown_status(job.status),
        model=job.spec.model,
        fine_tuned_model=fine_tuned_model(job) if job.has_model else None,
        progress={**done, "fraction": round(fraction, 4)},
        metrics=metrics,
        verdict=result.get("verdict"),
        summary=result.get("summary"),
        error=None if job.error is None else job.error.model_dump(),
        attempt=job.attempt,
        checkpoint=job.checkpoint,
        arguments=job.spec.arguments,
        metadata=job.spec.metadata,
        created_at=job.created,
        started_at=job.started,
        ended_at=job.ended,
    )


def _shown_status(status: Status) -> ShownStatus:
    return "completed" if status == "succeeded" else status


@router.post("")
def create(body: FinetuneRequest, services: ServicesOf, caller: Trainer) -> Job:
    """Create a job. Everything that is wrong with the request is answered at once (400).

    The same request again within two minutes gives the same job, so that a client may repeat one whose answer was lost.
    """
    problems: list[str] = []
    training = _rows(body, services, caller.owner, ("pairs", "triplets", "nodes", "training_file"), problems)
    validation = _rows(body, services, caller.owner, ("validation_pairs", "validation_file"), problems)
    if training is None and not problems:
        problems.append("no training data: expected one of pairs, triplets, nodes and training_file")
    job, _ = order(
        services,
        owner=caller.id,
        model=body.model or next(iter(services.settings.allowed_models)),
        training=training,
        validation=validation,
        arguments=body.model_extra,
        query_origin=body.query_origin,
        suffix=body.suffix,
        metadata=body.metadata,
        extra={name: value for name in ("training_file", "validation_file") if (value := getattr(body, name))},
        request_digest=hashlib.sha256(json.dumps(body.model_dump(mode="json")).encode()).hexdigest(),
        problems=problems,
    )
    return shown(job)


@router.get("")
def jobs(
    services: ServicesOf,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    status: ShownStatus | None = None,
) -> JobList:
    """Jobs of the caller's token, newest first; with the scope admin those of all tokens."""
    statuses = None if status is None else ["succeeded" if status == "completed" else status]
    found, more = services.jobs.list(caller.owner, after=after, limit=limit, statuses=statuses)
    return JobList(data=[shown(job) for job in found], has_more=more)


@router.get("/{job_id}")
def job(job_id: str, services: ServicesOf, caller: Reader) -> Job:
    """A job with its progress, metrics and verdict."""
    return shown(services.jobs.get(job_id, caller.owner))


@router.delete("/{job_id}")
def cancel(job_id: str, services: ServicesOf, caller: Trainer) -> Job:
    """Cancel a job: its worker stops after the step it is in, and its checkpoint is kept."""
    services.jobs.get(job_id, caller.owner)
    return shown(services.apply(job_id, CancelRequested()))


@router.post("/{job_id}/pause")
def pause(job_id: str, services: ServicesOf, caller: Trainer) -> Job:
    """Stop a job at a checkpoint for a while."""
    services.jobs.get(job_id, caller.owner)
    return shown(services.apply(job_id, PauseRequested()))


@router.post("/{job_id}/resume")
def resume(job_id: str, services: ServicesOf, caller: Trainer) -> Job:
    """Continue a paused, cancelled or failed job from its checkpoint."""
    services.jobs.get(job_id, caller.owner)
    return shown(services.apply(job_id, ResumeRequested()))


def stream_start(
    job_id: str,
    services: ServicesOf,
    caller: Reader,
    last_event_id: Annotated[str | None, Header()] = None,
) -> int:
    """The sequence after which a stream begins; checked before it begins, so that errors are answers."""
    services.jobs.get(job_id, caller.owner)
    if not last_event_id:
        return 0
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 16):
        raise ServiceError(
            f"Last-Event-ID {last_event_id!r:.40}",
            "the id of an event of this stream, a whole number",
            "Leave it out to get all events.",
            param="Last-Event-ID",
        )
    return int(last_event_id)


@router.get("/{job_id}/events", response_class=EventSourceResponse)
async def events(
    job_id: str, request: Request, services: ServicesOf, start: Annotated[int, Depends(stream_start)]
) -> AsyncIterator[ServerSentEvent]:
    """The job's events as they happen, from its first one or from the one after `Last-Event-ID`.

    Types are `progress`, `heartbeat` where there is no news, `complete` when the job has completed or was cancelled,
    and `error` when it failed; the stream ends with the last two.
    """
    store, last, quiet, asked, seen = services.jobs, start, 0.0, 0.0, -1
    status = (await to_thread.run_sync(store.get, job_id)).status
    yield ServerSentEvent(event="heartbeat", data={"status": _shown_status(status)}, retry=_RETRY_MS)
    while not request.app.state.stopping.is_set():
        latest = await to_thread.run_sync(store.latest)
        found: Sequence[StoredEvent] = ()
        if latest != seen or asked >= _ASK_S:
            found, asked = await to_thread.run_sync(store.events, job_id, last), 0.0
        for stored in found:
            last, status, quiet = stored.sequence, stored.status, 0.0
            yield _sse(stored)
        if not found:
            seen = latest
            if status in ENDED:
                return
            if quiet >= services.settings.sse_heartbeat_s:
                yield ServerSentEvent(event="heartbeat", data={"status": _shown_status(status)})
                quiet = 0.0
            await anyio.sleep(_POLL_S)
            quiet, asked = quiet + _POLL_S, asked + _POLL_S


def _sse(stored: StoredEvent) -> ServerSentEvent:
    """An event as a client sees it."""
    event = stored.event
    data: dict[str, Any] = {"job_event": event.kind, "status": _shown_status(stored.status), "time": event.time}
    if isinstance(event, Progressed):
        data.update(event.progress.model_dump())
    data.update(event.model_dump(include={"result", "error", "step", "attempt"}))
    kind = {"succeeded": "complete", "cancelled": "complete", "failed": "error"}.get(stored.status, "progress")
    if event.kind in ("run_deleted", "model_deleted"):
        kind = "progress"
    return ServerSentEvent(event=kind, id=str(stored.sequence), data=data)


def _rows(
    body: FinetuneRequest, services: Services, owner: str | None, names: tuple[str, ...], problems: list[str]
) -> Rows | None:
    """The rows of the one field of these that is given; None if there is none."""
    given: Mapping[str, Any] = {name: value for name in names if (value := getattr(body, name)) is not None}
    if len(given) > 1:
        problems.append(f"{' and '.join(given)} together: expected one of them")
    for name, value in given.items():
        if isinstance(value, list):
            return inline_rows(name, value)
        try:
            return file_rows(services.files.path(services.files.get(value, owner)), name, problems)
        except ServiceError as error:
            problems.append(f"{name}={value!r:.80}: {error.expected}")
    return None
