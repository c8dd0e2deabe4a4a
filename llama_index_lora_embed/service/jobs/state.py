"""The life of a job as a pure function: `decide(state, event)` is the next state and what is to be done.

A job's state is nothing but the fold of its events, so that a restart replays them. Events come from clients (created,
..._requested, model_deleted), from workers (leased, progress, ...) and from the sweep (lease_expired, run_deleted). A
worker's events carry the attempt that its lease was given for: the fencing token, by which events of an earlier attempt
change nothing.

    queued -> running -> succeeded | failed
    queued <- running                    worker stopped or died; training resumes from its checkpoint
    running -> pausing -> paused         queued -> paused       paused, cancelled, failed -> queued (resume)
    running -> cancelling -> cancelled   queued, paused -> cancelled
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from llama_index_lora_embed.service.errors import ServiceError

Status = Literal["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"]
HELD: tuple[Status, ...] = ("running", "pausing", "cancelling")
"""Statuses in which a worker holds the job's lease."""
LIVE: tuple[Status, ...] = ("queued", "paused", *HELD)
"""Statuses in which a job has not ended."""
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
"""Statuses in which a job has ended; "succeeded" for good, the others until the job is resumed."""
Command = Literal["enqueue", "delete_run", "delete_model"]
"""What is to be done after an event was stored: put the job's id into the queue; delete its data and checkpoints;
delete its adapter and report."""


class Frozen(BaseModel):
    """Base of states and events."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class JobSpec(Frozen):
    """What a client ordered, checked; never changes.

    The data lies in `settings.jobs_dir / <job id>`; the adapter is written to `settings.models_dir / <job id>`.
    """

    owner: str
    """Id of the token that created the job; only it, and the scope admin, see the job."""
    model: str
    """Base model, a name of `settings.allowed_models`."""
    data: Literal["queries", "pairs", "nodes"]
    """What the training data is: queries and passages, labelled pairs, or nodes."""
    validation: bool = False
    """Whether the client gave validation data."""
    arguments: dict[str, Any] = {}
    """Arguments of `FinetuneConfig.from_arguments` that the client chose."""
    suffix: str | None = None
    """Name in the model's name: `ft:<base>:<suffix>:<id>`."""
    metadata: dict[str, str] = {}
    """The client's own labels."""
    extra: dict[str, Any] = {}
    """What a face of the API keeps to show it again, such as ids of files."""


class Progress(Frozen):
    """How far training is."""

    step: int
    """Steps done."""
    total: int
    """Steps of the run."""
    loss: float | None = None
    """Training loss, the mean since the last report of the trainer."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    epoch: float | None = None
    """Passes over the training data."""


class JobError(Frozen):
    """Why a job failed."""

    code: str
    """For programs: disk_full, time_limit, out_of_memory, worker_lost, invalid_data, internal_error."""
    message: str
    """For people."""


class JobState(Frozen):
    """A job as of an event."""

    id: str
    """The prefix "ftjob-" and 24 characters."""
    spec: JobSpec
    """What was ordered."""
    status: Status = "queued"
    """Where in its life the job is."""
    attempt: int = 0
    """Leases given so far; the number of the last one is the fencing token."""
    worker: str | None = None
    """Worker that holds the lease."""
    progress: Progress | None = None
    """Progress of the current attempt, or of the last one."""
    checkpoint: int | None = None
    """Step of the newest checkpoint."""
    lost: int = 0
    """Workers lost in a row without a new checkpoint."""
    result: dict[str, Any] | None = None
    """Of a job that succeeded: fingerprint, verdict, metrics (see `worker.result_of`)."""
    error: JobError | None = None
    """Of a job that failed."""
    run_deleted: bool = False
    """Whether training data and checkpoints were deleted, because the job ended long ago."""
    model_deleted: bool = False
    """Whether a client has deleted the adapter."""
    created: float
    """Seconds since 1970, as all times."""
    started: float | None = None
    """First lease."""
    leased: float | None = None
    """Last lease."""
    ended: float | None = None
    """When the job ended; None while it has not, or has been resumed."""
    seconds: float = 0.0
    """Seconds that earlier attempts took."""

    @property
    def has_model(self) -> bool:
        """Whether there is an adapter to embed with."""
        return self.status == "succeeded" and not self.model_deleted

    @property
    def wish(self) -> Literal["cancel", "pause"] | None:
        """What the worker that holds the lease is to do at the next checkpoint."""
        return {"cancelling": "cancel", "pausing": "pause"}.get(self.status)  # type: ignore[return-value]


class _Event(Frozen):
    time: float = Field(default_factory=time.time)


class _OfAttempt(_Event):
    attempt: int


class Created(_Event):
    """The first event of a job."""

    kind: Literal["created"] = "created"
    id: str
    spec: JobSpec


class Leased(_Event):
    """A worker has taken the job; `attempt` is one more than before."""

    kind: Literal["leased"] = "leased"
    attempt: int
    worker: str


class LeaseExpired(_OfAttempt):
    """The worker was not heard of for too long; the job fails where it lost `limit` workers without a checkpoint."""

    kind: Literal["lease_expired"] = "lease_expired"
    limit: int = 5


class Progressed(_OfAttempt):
    """Training has come further."""

    kind: Literal["progress"] = "progress"
    progress: Progress


class Checkpointed(_OfAttempt):
    """A checkpoint is complete on disk."""

    kind: Literal["checkpointed"] = "checkpointed"
    step: int


class Stopped(_OfAttempt):
    """The worker has stopped at a checkpoint: as the client wished, or because it is shut down."""

    kind: Literal["stopped"] = "stopped"


class Succeeded(_OfAttempt):
    """The adapter is on disk."""

    kind: Literal["succeeded"] = "succeeded"
    result: dict[str, Any]


class Failed(_OfAttempt):
    """The attempt cannot go on; checkpoints are kept."""

    kind: Literal["failed"] = "failed"
    error: JobError


class PauseRequested(_Event):
    """A client wants the job to stop for a while."""

    kind: Literal["pause_requested"] = "pause_requested"


class CancelRequested(_Event):
    """A client wants the job to end; its checkpoint is kept."""

    kind: Literal["cancel_requested"] = "cancel_requested"


class ResumeRequested(_Event):
    """A client wants a stopped job to go on from its checkpoint."""

    kind: Literal["resume_requested"] = "resume_requested"


class RunDeleted(_Event):
    """Data and checkpoints of a job that ended long ago are to be deleted."""

    kind: Literal["run_deleted"] = "run_deleted"


class ModelDeleted(_Event):
    """A client wants the adapter to be deleted."""

    kind: Literal["model_deleted"] = "model_deleted"


Event: TypeAlias = (
    Created
    | Leased
    | LeaseExpired
    | Progressed
    | Checkpointed
    | Stopped
    | Succeeded
    | Failed
    | PauseRequested
    | CancelRequested
    | ResumeRequested
    | RunDeleted
    | ModelDeleted
)
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])
"""Reads an event from JSON: `EVENT.validate_json(text)`."""


@dataclass(frozen=True)
class Decision:
    """What follows from an event.

    Attributes:
        state: The next state; the same object if the event changes nothing, in which case it is not stored.
        commands: What is to be done once the event is stored.
    """

    state: JobState
    commands: tuple[Command, ...] = ()


def decide(state: JobState | None, event: Event) -> Decision:
    """The next state and what is to be done.

    An event of another attempt than the one that holds the lease changes nothing, nor does a wish that is fulfilled
    already.

    Args:
        state: Before the event; None before the first one.
        event: What happened.

    Raises:
        ServiceError: A client's wish that the job's status does not allow.
    """
    if state is None:
        if not isinstance(event, Created):
            raise AssertionError(f"the first event of a job is {event.kind!r}, expected 'created'")
        return Decision(JobState(id=event.id, spec=event.spec, created=event.time), ("enqueue",))
    if isinstance(event, Created):
        return Decision(state)
    if isinstance(event, Leased):
        if state.status != "queued" or event.attempt != state.attempt + 1:
            return Decision(state)
        return Decision(
            _with(
                state,
                status="running",
                attempt=event.attempt,
                worker=event.worker,
                progress=None,
                started=state.started or event.time,
                leased=event.time,
            )
        )
    if isinstance(event, (PauseRequested, CancelRequested, ResumeRequested)):
        return _wished(state, event)
    if isinstance(event, RunDeleted):
        if state.status not in ENDED or state.run_deleted:
            return Decision(state)
        return Decision(_with(state, run_deleted=True), ("delete_run",))
    if isinstance(event, ModelDeleted):
        return Decision(_with(state, model_deleted=True), ("delete_model",)) if state.has_model else Decision(state)
    if state.status not in HELD or event.attempt != state.attempt:
        return Decision(state)
    return _from_worker(state, event)


def replay(events: list[Event]) -> JobState:
    """The state after all events of a job, in their order."""
    state: JobState | None = None
    for event in events:
        state = decide(state, event).state
    assert state is not None, "a job without events"
    return state


def _wished(state: JobState, event: PauseRequested | CancelRequested | ResumeRequested) -> Decision:
    status = state.status
    if isinstance(event, CancelRequested):
        if status in ("cancelling", "cancelled"):
            return Decision(state)
        if status in ("queued", "paused"):
            return Decision(_with(state, status="cancelled", ended=event.time))
        if status in ("running", "pausing"):
            return Decision(_with(state, status="cancelling"))
        raise _refused(state, "cancelled", "a job that has not ended", "There is nothing to cancel.")
    if isinstance(event, PauseRequested):
        if status in ("pausing", "paused"):
            return Decision(state)
        if status == "queued":
            return Decision(_with(state, status="paused"))
        if status == "running":
            return Decision(_with(state, status="pausing"))
        raise _refused(state, "paused", "a job that is queued or running", "There is nothing to pause.")
    if status in ("queued", "running"):
        return Decision(state)
    if status == "succeeded" or state.run_deleted:
        why = "it has succeeded" if status == "succeeded" else "its data and checkpoints were deleted after its end"
        raise _refused(state, f"resumed: {why}", "a paused, cancelled or failed job", "Create a new job.")
    if status in ("pausing", "cancelling"):
        raise _refused(
            state, "resumed yet", "a job that has stopped", "Its worker is stopping; try again in a few seconds."
        )
    return Decision(_with(state, status="queued", ended=None, error=None, lost=0), ("enqueue",))


def _refused(state: JobState, what: str, expected: str, hint: str) -> ServiceError:
    return ServiceError(
        f"job {state.id!r} with status {state.status!r}, which cannot be {what}",
        expected,
        hint,
        code="invalid_job_status",
        param="id",
    )


def _from_worker(
    state: JobState, event: LeaseExpired | Progressed | Checkpointed | Stopped | Succeeded | Failed
) -> Decision:
    """What follows from an event of the attempt that holds the lease."""
    if isinstance(event, Progressed):
        if state.progress is not None and event.progress.step < state.progress.step:
            return Decision(state)
        return Decision(_with(state, progress=event.progress))
    if isinstance(event, Checkpointed):
        if state.checkpoint is not None and event.step <= state.checkpoint:
            return Decision(state)
        return Decision(_with(state, checkpoint=event.step, lost=0))
    free: dict[str, Any] = {
        "worker": None,
        "seconds": state.seconds + max(0.0, event.time - (state.leased or event.time)),
    }
    if isinstance(event, Succeeded):  # also of a job that was to be cancelled: the result is there
        return Decision(_with(state, status="succeeded", result=event.result, ended=event.time, lost=0, **free))
    if isinstance(event, Failed):
        return Decision(_with(state, status="failed", error=event.error, ended=event.time, **free))
    if state.status == "cancelling":
        return Decision(_with(state, status="cancelled", ended=event.time, **free))
    if state.status == "pausing":
        return Decision(_with(state, status="paused", **free))
    if isinstance(event, LeaseExpired):
        free["lost"] = state.lost + 1
        if free["lost"] >= event.limit:
            message = (
                f"{free['lost']} workers in a row were lost without a new checkpoint, the last one at attempt "
                f"{state.attempt}. Often too little memory is the cause: try a smaller batch_size, then resume the job."
            )
            error = JobError(code="worker_lost", message=message)
            return Decision(_with(state, status="failed", error=error, ended=event.time, **free))
    return Decision(_with(state, status="queued", **free), ("enqueue",))


def _with(state: JobState, **changes: Any) -> JobState:
    return state.model_copy(update=changes)
