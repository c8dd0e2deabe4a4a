"""The tables of jobs: their events, their states, and the leases; and what rows stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import BigInteger, Column, Integer, Text, UniqueConstraint
from sqlmodel import Field, SQLModel

from llama_index_lora_embed.service.jobs.state import EVENT, Event, JobState, Status


class JobEventRow(SQLModel, table=True):
    """An event of a job; rows are only added."""

    __tablename__ = "job_event"
    __table_args__ = (UniqueConstraint("job_id", "sequence"),)

    id: int | None = Field(
        default=None, sa_column=Column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    )
    job_id: str = Field(index=True, max_length=64)
    sequence: int
    time: float
    kind: str
    status: str
    data: str = Field(sa_column=Column(Text, nullable=False))


class JobRow(SQLModel, table=True):
    """The projection of a job: its state after its last event."""

    __tablename__ = "job"

    id: str = Field(primary_key=True, max_length=64)
    owner: str = Field(index=True)
    status: str = Field(index=True)
    created: float = Field(index=True)
    ended: float | None = None
    sequence: int
    request_digest: str | None = Field(default=None, index=True)
    state: str = Field(sa_column=Column(Text, nullable=False))


class LeaseRow(SQLModel, table=True):
    """Which worker a job is leased to, and until when."""

    __tablename__ = "lease"

    job_id: str = Field(primary_key=True, max_length=64)
    worker: str
    attempt: int
    expires: float = Field(index=True)


@dataclass(frozen=True)
class StoredEvent:
    """An event with its place.

    Attributes:
        sequence: Number within the job, from 1.
        status: The job's status after it.
        event: What happened.
    """

    sequence: int
    status: Status
    event: Event

    @property
    def id(self) -> str:
        """The prefix "ftevent-" and the sequence; unique within the job."""
        return f"ftevent-{self.sequence:024d}"


def columns_of(state: JobState) -> dict[str, Any]:
    """The columns of a job's row."""
    return {
        "id": state.id,
        "owner": state.spec.owner,
        "status": state.status,
        "created": state.created,
        "ended": state.ended,
        "state": state.model_dump_json(),
    }


def state_of(row: JobRow) -> JobState:
    """The job of a row."""
    return JobState.model_validate_json(row.state)


def stored_event(row: JobEventRow) -> StoredEvent:
    """The event of a row."""
    return StoredEvent(row.sequence, cast(Status, row.status), EVENT.validate_json(row.data))


def event_row(state: JobState, sequence: int, event: Event) -> JobEventRow:
    """The row of an event after which a job has this state."""
    return JobEventRow(
        job_id=state.id,
        sequence=sequence,
        time=event.time,
        kind=event.kind,
        status=state.status,
        data=event.model_dump_json(),
    )
