"""The jobs in the database: an append-only table of events, the projection of each job, and the leases.

`JobStore.append` is the only way in which a job changes. It reads the state, asks `state.decide`, and writes event and
projection in one transaction; the callers do what the decision commands (`service.Services.carry_out`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, func
from sqlmodel import Session, col, delete, select

from llama_index_lora_embed.service.database import Database, is_id, lock, new_id, select_page
from llama_index_lora_embed.service.errors import ServiceError, not_found
from llama_index_lora_embed.service.jobs.state import (
    EVENT,
    HELD,
    LIVE,
    Created,
    Decision,
    Event,
    JobSpec,
    JobState,
    Leased,
    LeaseExpired,
    decide,
    replay,
)
from llama_index_lora_embed.service.jobs.tables import (
    JobEventRow,
    JobRow,
    LeaseRow,
    StoredEvent,
    columns_of,
    event_row,
    state_of,
    stored_event,
)

logger = logging.getLogger(__name__)
_DEDUPLICATE_S = 120.0
_LOOK_S = 0.2


class JobStore:
    """The jobs of the service.

    Example:
        >>> store = JobStore(Database("sqlite://"))  # doctest: +SKIP
        >>> job, new = store.create(JobSpec(owner="t1", model="base", data="queries"))  # doctest: +SKIP
        >>> decision = store.append(job.id, CancelRequested())  # doctest: +SKIP
        >>> decision.state.status, decision.commands  # doctest: +SKIP
        ('cancelled', ())

    Args:
        database: Where the tables are created.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._latest, self._looked, self._lock = 0, 0.0, threading.Lock()
        database.create_tables()

    def create(
        self,
        spec: JobSpec,
        *,
        job_id: str | None = None,
        request_digest: str | None = None,
        max_per_owner: int | None = None,
        max_queued: int | None = None,
    ) -> tuple[JobState, bool]:
        """A new job, or the one that the same owner created with the same request in the last two minutes.

        A job that failed or was cancelled meanwhile does not count.

        The caller enqueues a new job (`Services.submit` does both).

        Args:
            spec: What was ordered.
            job_id: The id under which its data lies already; None makes one.
            request_digest: Digest of the request; a client that sends a request again without knowing whether it
                arrived gets the job that it created. None never looks for one.
            max_per_owner: Jobs of the owner that may be live at once.
            max_queued: Jobs of all owners that may be queued at once.

        Returns:
            The job, and whether it is new.

        Raises:
            ServiceError: 429, too many jobs.
        """
        created = Created(id=job_id or new_id("ftjob-"), spec=spec)
        with self.database.write() as session:
            lock(session, "create")  # or two requests at once would not see each other
            if request_digest is not None:
                query = select(JobRow).where(
                    JobRow.owner == spec.owner,
                    JobRow.request_digest == request_digest,
                    col(JobRow.status).not_in(("cancelled", "failed")),
                    JobRow.created > created.time - _DEDUPLICATE_S,
                )
                if row := session.exec(query.order_by(col(JobRow.created).desc())).first():
                    return state_of(row), False
            live = col(JobRow.status).in_(LIVE)
            _refuse(session, max_per_owner, "jobs of this token that have not ended", live, JobRow.owner == spec.owner)
            _refuse(session, max_queued, "queued jobs", col(JobRow.status) == "queued")
            state = decide(None, created).state
            session.add(JobRow(**columns_of(state), sequence=1, request_digest=request_digest))
            session.add(event_row(state, 1, created))
        return state, True

    def append(self, job_id: str, event: Event) -> Decision:
        """Store an event, unless it changes nothing.

        Returns:
            The state afterwards, and the commands to carry out. An event that changed nothing has no commands; a worker
            learns from `state.attempt` and `state.worker` whether it still holds the lease.

        Raises:
            ServiceError: 404, there is no such job; 400, the job's status does not allow what a client wishes.
        """
        with self.database.write() as session:
            return self._append(session, self._row(session, job_id), event)

    def get(self, job_id: str, owner: str | None = None) -> JobState:
        """A job.

        Args:
            job_id: Its id.
            owner: The token that asks; None for one that may see all jobs.

        Raises:
            ServiceError: 404, there is no such job, or it belongs to another owner.
        """
        with self.database.read() as session:
            row = session.get(JobRow, job_id) if is_id(job_id) else None
            if row is None or owner not in (None, row.owner):
                raise not_found("job", job_id, "GET /v1/finetune lists your jobs.")
            return state_of(row)

    def list(
        self,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        statuses: Collection[str] | None = None,
    ) -> tuple[list[JobState], bool]:
        """Jobs, newest first, and whether there are more.

        Args:
            owner: The token that asks; None for one that may see all jobs.
            after: Id of the last job of the page before.
            limit: Length of the page.
            statuses: Only jobs with one of these.

        Raises:
            ServiceError: 404, there is no job `after`.
        """
        query = select(JobRow)
        if owner is not None:
            query = query.where(JobRow.owner == owner)
        if statuses is not None:
            query = query.where(col(JobRow.status).in_(statuses))
        last = None if after is None else self.get(after, owner)
        place = None if last is None else (last.created, last.id)
        query = select_page(query, col(JobRow.created), col(JobRow.id), place, limit)
        with self.database.read() as session:
            rows = session.exec(query).all()
        return [state_of(row) for row in rows[:limit]], len(rows) > limit

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[StoredEvent]:
        """Events of a job with a sequence above `after`, oldest first; empty if there is no such job."""
        query = select(JobEventRow).where(JobEventRow.job_id == job_id, JobEventRow.sequence > after)
        with self.database.read() as session:
            rows = session.exec(query.order_by(col(JobEventRow.sequence)).limit(limit)).all()
        return [stored_event(row) for row in rows]

    def latest(self) -> int:
        """A number that grows with every event of any job; read at most every 0.2 s, whoever asks.

        Many streams that wait for news ask for it, instead of each for the events of its job.
        """
        with self._lock:
            if time.monotonic() - self._looked > _LOOK_S:
                with self.database.read() as session:
                    self._latest = session.exec(select(func.max(JobEventRow.id))).one() or 0
                self._looked = time.monotonic()
            return self._latest

    def history(
        self, job_id: str, *, before: int | None = None, limit: int = 20, kinds: Collection[str] | None = None
    ) -> tuple[Sequence[StoredEvent], bool]:
        """Events of a job, newest first, and whether there are more.

        Args:
            job_id: Of the job.
            before: Only events with a smaller sequence.
            limit: Length of the page.
            kinds: Only events of these kinds.
        """
        query = select(JobEventRow).where(JobEventRow.job_id == job_id)
        if before is not None:
            query = query.where(JobEventRow.sequence < before)
        if kinds is not None:
            query = query.where(col(JobEventRow.kind).in_(kinds))
        with self.database.read() as session:
            rows = session.exec(query.order_by(col(JobEventRow.sequence).desc()).limit(limit + 1)).all()
        return [stored_event(row) for row in rows[:limit]], len(rows) > limit

    def counts(self) -> dict[str, int]:
        """Number of jobs by status; statuses without a job are left out."""
        with self.database.read() as session:
            query = select(JobRow.status, func.count()).group_by(JobRow.status)
            return {status: int(count) for status, count in session.exec(query).all()}

    def queued(self) -> Sequence[str]:
        """Ids of the queued jobs, oldest first."""
        with self.database.read() as session:
            query = select(JobRow.id).where(JobRow.status == "queued").order_by(col(JobRow.created))
            return session.exec(query).all()

    def lease(self, job_id: str, worker: str, seconds: float) -> JobState | None:
        """Give a queued job to a worker; None if it is not queued (any more), so that only one worker gets it."""
        with self.database.write() as session:
            row = session.get(JobRow, job_id, with_for_update=True)
            if row is None or row.status != "queued":
                return None
            event = Leased(attempt=state_of(row).attempt + 1, worker=worker)
            state = self._append(session, row, event).state
            lease = LeaseRow(job_id=job_id, worker=worker, attempt=state.attempt, expires=event.time + seconds)
            session.merge(lease)
        return state

    def renew(self, job_id: str, attempt: int, seconds: float) -> JobState | None:
        """Prolong the lease of an attempt; the job as it is now, or None if the attempt holds no lease any more."""
        with self.database.write() as session:
            row = session.get(JobRow, job_id, with_for_update=True)
            lease = session.get(LeaseRow, job_id)
            if row is None or lease is None or lease.attempt != attempt:
                return None
            lease.expires = time.time() + seconds
            session.add(lease)
            return state_of(row)

    def expired(self) -> Sequence[tuple[str, int]]:
        """(job id, attempt) of the leases that have expired."""
        with self.database.read() as session:
            query = select(LeaseRow.job_id, LeaseRow.attempt).where(LeaseRow.expires < time.time())
            return [(job_id, attempt) for job_id, attempt in session.exec(query).all()]

    def expire(self, job_id: str, attempt: int, limit: int) -> Decision | None:
        """Take a lease back that has expired; None if it was renewed or ended meanwhile."""
        with self.database.write() as session:
            row = session.get(JobRow, job_id, with_for_update=True)
            lease = session.get(LeaseRow, job_id)
            if row is None or lease is None or lease.attempt != attempt or lease.expires >= time.time():
                return None
            return self._append(session, row, LeaseExpired(attempt=attempt, limit=limit))

    def ended_before(self, moment: float) -> Sequence[str]:
        """Ids of jobs that ended before a moment; "paused" is no end."""
        with self.database.read() as session:
            return session.exec(select(JobRow.id).where(col(JobRow.ended) < moment)).all()

    def without_model(self) -> Sequence[str]:
        """Ids of the jobs whose model was deleted."""
        with self.database.read() as session:
            query = select(JobRow).where(col(JobRow.state).contains('"model_deleted":true'))
            return [row.id for row in session.exec(query).all() if state_of(row).model_deleted]

    def known(self, job_ids: Collection[str]) -> set[str]:
        """Those of the ids that are jobs."""
        job_ids = [job_id for job_id in job_ids if is_id(job_id)]
        with self.database.read() as session:
            return set(session.exec(select(JobRow.id).where(col(JobRow.id).in_(job_ids))).all())

    def rebuild(self) -> int:
        """Replay the events of all jobs and correct the projections that differ; how many did.

        Event and projection are written together, so that only a database that was changed by hand, or a new version of
        `decide`, makes a difference.
        """
        with self.database.read() as session:
            ids = session.exec(select(JobRow.id)).all()
        corrected = 0
        for job_id in ids:
            with self.database.write() as session:
                row = self._row(session, job_id)
                query = select(JobEventRow.data).where(JobEventRow.job_id == job_id)
                log = session.exec(query.order_by(col(JobEventRow.sequence))).all()
                columns = columns_of(replay([EVENT.validate_json(data) for data in log]))
                if any(getattr(row, name) != value for name, value in columns.items()):
                    row.sqlmodel_update(columns)
                    session.add(row)
                    corrected += 1
                    logger.warning("the projection of job %s differed from its events and was rebuilt", job_id)
        return corrected

    def _row(self, session: Session, job_id: str) -> JobRow:
        row = session.get(JobRow, job_id, with_for_update=True) if is_id(job_id) else None
        if row is None:
            raise not_found("job", job_id, "GET /v1/finetune lists your jobs.")
        return row

    def _append(self, session: Session, row: JobRow, event: Event) -> Decision:
        before = state_of(row)
        decision = decide(before, event)
        state = decision.state
        if state is before:
            return decision
        row.sqlmodel_update(columns_of(state))
        row.sequence += 1
        session.add(row)
        session.add(event_row(state, row.sequence, event))
        if before.status in HELD and state.status not in HELD:
            session.exec(delete(LeaseRow).where(col(LeaseRow.job_id) == row.id))
        return decision


def _refuse(session: Session, limit: int | None, what: str, *conditions: ColumnElement[bool] | bool) -> None:
    if limit is None:
        return
    count = session.exec(select(func.count()).select_from(JobRow).where(*conditions)).one()
    if count >= limit:
        raise ServiceError(
            f"{count} {what}",
            f"at most {limit} at once",
            "Wait until one has ended, or cancel one.",
            status=429,
            code="too_many_jobs",
            headers={"Retry-After": "60"},
        )
