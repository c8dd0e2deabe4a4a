import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.jobs.state import (
    ENDED,
    EVENT,
    HELD,
    CancelRequested,
    Checkpointed,
    Created,
    Failed,
    JobError,
    JobSpec,
    Leased,
    LeaseExpired,
    ModelDeleted,
    PauseRequested,
    Progress,
    Progressed,
    ResumeRequested,
    RunDeleted,
    Stopped,
    Succeeded,
    decide,
    replay,
)

CREATED = Created(id="ftjob-1", spec=JobSpec(owner="t", model="base", data="queries"), time=0)
ATTEMPT = st.integers(0, 6)
STEP = st.integers(0, 9)
EVENTS = st.one_of(
    st.builds(Leased, attempt=ATTEMPT, worker=st.sampled_from("ab")),
    st.builds(LeaseExpired, attempt=ATTEMPT, limit=st.integers(1, 3)),
    st.builds(Progressed, attempt=ATTEMPT, progress=st.builds(Progress, step=STEP, total=st.just(9))),
    st.builds(Checkpointed, attempt=ATTEMPT, step=STEP),
    st.builds(Stopped, attempt=ATTEMPT),
    st.builds(Succeeded, attempt=ATTEMPT, result=st.just({"verdict": "BETTER"})),
    st.builds(Failed, attempt=ATTEMPT, error=st.just(JobError(code="disk_full", message="full"))),
    st.builds(PauseRequested),
    st.builds(CancelRequested),
    st.builds(ResumeRequested),
    st.builds(RunDeleted),
    st.builds(ModelDeleted),
    st.just(CREATED),
)


def likely(state, event):
    """Half of the events belong to the attempt that runs, so that long lives are met."""
    if isinstance(event, Leased):
        return event.model_copy(update={"attempt": state.attempt + 1}) if event.attempt % 2 else event
    if hasattr(event, "attempt") and event.attempt % 2:
        return event.model_copy(update={"attempt": state.attempt})
    return event


def walk(events):
    """(state before, event, decision) of each event that is not refused, after the first one."""
    state = decide(None, CREATED).state
    for event in events:
        event = likely(state, event)
        try:
            decision = decide(state, event)
        except ServiceError:
            if not isinstance(event, (PauseRequested, CancelRequested, ResumeRequested)):
                raise  # only wishes are refused
            continue
        yield state, event, decision
        state = decision.state


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_a_job_ends_once_unless_it_is_resumed(events):
    for before, event, decision in walk(events):
        after = decision.state
        if before.status in ENDED and after.status != before.status:
            assert isinstance(event, ResumeRequested)
            assert before.status != "succeeded"
            assert after.status == "queued"
        assert (after.ended is not None) == (after.status in ENDED)
        assert (after.result is not None) == (after.status == "succeeded")
        assert (after.error is not None) == (after.status == "failed")


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_progress_and_attempts_never_go_back(events):
    for before, _, decision in walk(events):
        after = decision.state
        assert after.attempt >= before.attempt
        if after.attempt == before.attempt and before.progress is not None:
            assert after.progress is not None
            assert after.progress.step >= before.progress.step
        assert (after.checkpoint or 0) >= (before.checkpoint or 0)
        assert after.seconds >= before.seconds


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_events_of_another_attempt_and_of_a_job_that_is_not_held_change_nothing(events):
    for before, event, decision in walk(events):
        of_worker = hasattr(event, "attempt") and not isinstance(event, Leased)
        if of_worker and (event.attempt != before.attempt or before.status not in HELD):
            assert decision.state is before
            assert not decision.commands
        if isinstance(event, Leased) and decision.state is not before:
            assert before.status == "queued"
            assert decision.state.attempt == before.attempt + 1


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_a_worker_holds_the_job_exactly_while_it_is_held_and_every_queued_job_is_enqueued(events):
    for before, _, decision in walk(events):
        assert (decision.state.worker is not None) == (decision.state.status in HELD)
        newly_queued = decision.state.status == "queued" != before.status
        assert ("enqueue" in decision.commands) == newly_queued


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_the_log_gives_the_state_again_from_json(events):
    log, state = [CREATED], decide(None, CREATED).state
    for before, event, decision in walk(events):
        if decision.state is not before:
            log.append(event)
        state = decision.state
    assert replay([EVENT.validate_json(event.model_dump_json()) for event in log]) == state


def test_a_worker_that_dies_again_and_again_without_a_checkpoint_ends_the_job():
    state = decide(None, CREATED).state
    for attempt in range(1, 4):
        state = decide(state, Leased(attempt=attempt, worker="a")).state
        if attempt == 1:
            state = decide(state, Checkpointed(attempt=1, step=5)).state
        state = decide(state, LeaseExpired(attempt=attempt, limit=3)).state
        assert (state.status, state.lost) == (("failed", 3) if attempt == 3 else ("queued", attempt))
    assert state.error.code == "worker_lost"
    assert decide(state, ResumeRequested()).state.lost == 0


@pytest.mark.parametrize(("request_", "stopping", "stopped"), [
    (CancelRequested(), "cancelling", "cancelled"), (PauseRequested(), "pausing", "paused"),
])  # fmt: skip
@pytest.mark.parametrize("end", [Stopped(attempt=1), LeaseExpired(attempt=1)])
def test_a_wish_is_fulfilled_when_the_worker_stops_or_dies(request_, stopping, stopped, end):
    state = decide(decide(None, CREATED).state, Leased(attempt=1, worker="a")).state
    state = decide(state, request_).state
    assert state.status == stopping
    with pytest.raises(ServiceError, match="try again"):
        decide(state, ResumeRequested())
    state = decide(state, end).state
    assert state.status == stopped
    resumed = decide(state, ResumeRequested())
    assert (resumed.state.status, resumed.commands) == ("queued", ("enqueue",))


def test_a_job_whose_data_was_deleted_is_not_resumed():
    state = decide(decide(None, CREATED).state, CancelRequested()).state
    decision = decide(state, RunDeleted())
    assert decision.commands == ("delete_run",)
    with pytest.raises(ServiceError, match="deleted after its end"):
        decide(decision.state, ResumeRequested())


def test_the_seconds_of_all_attempts_are_added():
    state = decide(None, CREATED).state
    state = decide(state, Leased(attempt=1, worker="a", time=10)).state
    state = decide(state, LeaseExpired(attempt=1, time=15)).state
    state = decide(state, Leased(attempt=2, worker="b", time=100)).state
    state = decide(state, Succeeded(attempt=2, result={}, time=103)).state
    assert (state.seconds, state.started, state.ended) == (8, 10, 103)
