import pytest

from tests.helpers.service import succeeded_job


@pytest.fixture
def services(app):
    return app.state.services


@pytest.fixture
def trainer(visit):
    return visit("read", "train")


@pytest.fixture
def job(trainer, services, adapter):
    return succeeded_job(services, adapter, services.tokens.list()[-1].id, suffix="mine")


def add(visitor, job, adapter="handbook"):
    return visitor.send("/adapters", {"adapter": adapter, "model": job.id}, "/adapters")


def test_a_jobs_model_becomes_a_version_that_is_used_and_rolled_back(trainer, job, services):
    assert "There are no adapters yet" in trainer.get("/adapters")
    for _ in range(2):
        assert add(trainer, job).headers["location"] == "/adapters"
    services.settings.report(job.id).write_text("report")
    page = trainer.get("/adapters")
    assert "No version is in use" in page
    assert page.count(f'href="/reports/{job.id}"') == 2
    for version in ("v1", "v2"):
        trainer.send("/adapters/handbook/promote", {"version": version}, "/adapters")
        assert f"{version} is in use" in trainer.get("/adapters")
    trainer.send("/adapters/handbook/rollback", {}, "/adapters")
    assert "v1 is in use" in trainer.get("/adapters")
    assert trainer.send("/adapters/handbook/promote", {"version": "v9"}, "/adapters").status_code == 404


@pytest.mark.parametrize("name", ["", "../x", "tiny", "<b>", "a" * 65])
def test_a_wrong_name_is_a_problem(trainer, job, name):
    answer = add(trainer, job, name)
    assert answer.status_code == 400
    assert "1 problem" in answer.text
    assert "<b>" not in answer.text


def test_others_see_the_adapter_but_not_its_job_and_change_nothing(trainer, visit, job, services):
    services.settings.report(job.id).write_text("report")
    add(trainer, job)
    reader, other = visit("read"), visit("read", "train")
    for page in (reader.get("/adapters"), other.get("/adapters")):
        assert "handbook" in page
        assert job.id not in page
    assert "Add a version" not in reader.get("/adapters")
    csrf = {"csrf": other.csrf("/adapters")}
    answer = other.client.post("/adapters/handbook/promote", data={**csrf, "version": "v1"})
    assert answer.status_code == 403
    assert "belongs to another token" in answer.text
    assert add(other, job).status_code == 404
    assert services.models.registry("handbook").promoted() is None
