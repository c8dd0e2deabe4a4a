import json
import re

import pytest

from llama_index_lora_embed.service.jobs.state import Failed, JobError, Progress, Progressed, Succeeded
from tests.helpers.service import pairs_of, sse_events

EVIL = "<script>alert('x')</script>\"'&"


def data_file(rows=None):
    rows = pairs_of() if rows is None else rows
    return ("train.jsonl", "\n".join(json.dumps(row) for row in rows).encode())


@pytest.fixture
def trainer(visit):
    return visit("read", "train")


@pytest.fixture
def services(app):
    return app.state.services


def created(visitor, **fields):
    answer = visitor.send("/jobs", {"model": "tiny", **fields}, "/jobs/new", files={"training": data_file()})
    assert answer.status_code == 303, answer.text
    return answer.headers["location"].removeprefix("/jobs/")


def finish(services, job_id, **result):
    job = services.jobs.lease(job_id, "w", 30)
    for step, loss in ((1, 2.5), (2, 1.5)):
        progress = Progress(step=step, total=2, loss=loss, learning_rate=1e-3)
        services.apply(job_id, Progressed(attempt=job.attempt, progress=progress))
    return services.apply(job_id, Succeeded(attempt=job.attempt, result=result))


def test_a_form_creates_the_job_that_the_api_would(trainer, services):
    job_id = created(
        trainer, epochs="3", batch_size="auto", learning_rate="5e-3", suffix="mine", query_origin="human",
        more='{"precision": "fp32", "metadata": {"team": "a"}}',
    )  # fmt: skip
    spec = services.jobs.get(job_id).spec
    assert spec.arguments == {"epochs": 3, "batch_size": "auto", "learning_rate": 5e-3, "precision": "fp32"}
    assert (spec.model, spec.suffix, spec.metadata) == ("tiny", "mine", {"team": "a"})
    assert services.queue.take(0) == job_id
    page = trainer.get("/")
    assert job_id in page
    assert f'data-live="{job_id}"' in page
    assert ">5 " not in page
    assert services.files.list()[0][0].filename == "train.jsonl"


def test_a_wrong_form_is_shown_again_with_all_problems_and_what_was_typed(trainer, services):
    answer = trainer.send(
        "/jobs",
        {"model": EVIL, "epochs": "0", "learning_rate": "fast", "suffix": EVIL, "more": '{"nonsense": 1}'},
        "/jobs/new",
        files={"training": data_file([{"query": EVIL, "passage": ""}])},
    )
    assert answer.status_code == 400
    for expected in ("problems", "model=", "epochs", "learning_rate", "suffix=", "nonsense", "an empty passage"):
        assert expected in answer.text, expected
    assert "<script>alert" not in answer.text
    assert 'value="&lt;script&gt;' in answer.text
    assert services.jobs.list()[0] == []
    assert services.files.list()[0] == [], "files of a job that was not created are deleted"


@pytest.mark.parametrize("more", ["{", "[1]", '{"epochs": NaN}', '{"metadata": 3}', '"\ud800"', "[" * 100_000])
def test_further_settings_that_are_no_json_object_are_a_problem(trainer, more):
    data = {"model": "tiny", "more": more.encode("utf-8", "surrogatepass")}
    answer = trainer.send("/jobs", data, "/jobs/new", files={"training": data_file()})
    assert answer.status_code == 400
    assert "urther settings" in answer.text or "metadata: " in answer.text


def test_a_form_without_a_file_says_so(trainer):
    for files in ({"training": ("", b"")}, {"validation": data_file()}):
        answer = trainer.send("/jobs", {"model": "tiny"}, "/jobs/new", files=files)
        assert answer.status_code == 400, files
        assert "training" in answer.text


def test_a_job_is_cancelled_paused_and_resumed(trainer, services):
    job_id = created(trainer)
    page = f"/jobs/{job_id}"
    assert re.findall(r'action="/jobs/[^/]+/(\w+)"', trainer.get(page)) == ["pause", "cancel"]
    for action, status, then in (
        ("pause", "paused", ["resume", "cancel"]),
        ("resume", "queued", ["pause", "cancel"]),
        ("cancel", "cancelled", ["resume"]),
    ):
        answer = trainer.send(f"{page}/{action}", {}, page)
        assert (answer.status_code, answer.headers["location"]) == (303, page)
        assert services.jobs.get(job_id).status == status
        assert re.findall(r'action="/jobs/[^/]+/(\w+)"', trainer.get(page)) == then
    answer = trainer.send(f"{page}/pause", {}, page)
    assert answer.status_code == 400
    assert "which cannot be paused" in answer.text
    assert trainer.send(f"{page}/delete", {}, page).status_code == 404


def test_a_finished_job_shows_verdict_metrics_and_report(trainer, services):
    job_id = created(trainer, suffix="mine")
    metrics = {"base": {"ndcg@10": 0.25}, "tuned": {"ndcg@10": 0.75}}
    finish(services, job_id, verdict="BETTER", summary=f"BETTER {EVIL}", metrics=metrics)
    page = trainer.get(f"/jobs/{job_id}")
    assert re.search(r'class="verdict better">\s*BETTER<', page)
    assert "0.250" in page
    assert "0.750" in page
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert "/reports/" not in page
    assert "There is no" not in trainer.get(f"/reports/{job_id}", 404)
    services.settings.report(job_id).write_text("<p>the report</p>")
    assert f'href="/reports/{job_id}"' in trainer.get(f"/jobs/{job_id}")
    answer = trainer.client.get(f"/reports/{job_id}")
    assert answer.text == "<p>the report</p>"
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"sandbox", "default-src 'none'"} <= set(policy)
    assert not any("script" in rule or "connect" in rule for rule in policy)
    assert trainer.client.get(f"/jobs/progress?ids={job_id},nothing").json() == {
        job_id: {"status": "completed", "fraction": 1.0, "verdict": "BETTER"}
    }


def test_a_failed_job_says_why(trainer, services):
    job_id = created(trainer)
    job = services.jobs.lease(job_id, "w", 30)
    services.apply(job_id, Failed(attempt=job.attempt, error=JobError(code="disk_full", message=f"full {EVIL}")))
    page = trainer.get(f"/jobs/{job_id}")
    assert "full &lt;script&gt;" in page
    assert re.findall(r'action="/jobs/[^/]+/(\w+)"', page) == ["resume"]


def test_events_are_those_of_the_api(trainer, services):
    job_id = created(trainer)
    finish(services, job_id, verdict="BETTER", summary="BETTER", metrics={})
    answer = trainer.client.get(f"/jobs/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = sse_events(answer.text)
    assert [event["data"]["loss"] for event in events if "loss" in event["data"]] == [2.5, 1.5]
    assert events[-1]["event"] == "complete"
    later = trainer.client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": events[-2]["id"]})
    assert [event["event"] for event in sse_events(later.text)] == ["heartbeat", "complete"]
    assert trainer.client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "x"}).status_code == 400


def test_jobs_of_other_tokens_are_not_there(trainer, visit, services):
    job_id = created(trainer)
    services.settings.report(job_id).write_text("secret")
    stranger = visit("read", "train")
    for path in (f"/jobs/{job_id}", f"/jobs/{job_id}/events", f"/reports/{job_id}"):
        assert "secret" not in stranger.get(path, 404)
    assert job_id not in stranger.get("/")
    assert stranger.client.get(f"/jobs/progress?ids={job_id}").json() == {}
    assert stranger.send(f"/jobs/{job_id}/cancel", {}, "/").status_code == 404
    assert services.jobs.get(job_id).status == "queued"
    assert job_id in visit("admin").get("/")


def test_the_list_has_pages(trainer, services, monkeypatch):
    monkeypatch.setattr("llama_index_lora_embed.service.web.jobs._PAGE", 2)
    ids = [created(trainer, suffix=f"job{i}") for i in range(3)]
    first = trainer.get("/")
    assert ids[0] not in first
    assert f'href="/?after={ids[1]}"' in first
    assert ids[0] in trainer.get(f"/?after={ids[1]}")
    trainer.get("/?after=ftjob-none", 404)
