"""What names of models stand for, and for whom."""

from __future__ import annotations

import pytest

from llama_index_lora_embed.service.embedding import ServedModel
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.models import fine_tuned_model, side_of
from tests.helpers.service import succeeded_job


def refused(services, name, owner="local"):
    with pytest.raises(ServiceError) as caught:
        services.models.find(name, owner)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_base_model_is_what_the_settings_name(services, tiny_model):
    assert services.models.find("tiny", "local") == ServedModel(tiny_model)


@pytest.mark.parametrize(
    "name", ["", "tiny ", "../tiny", "/etc/passwd", "sentence-transformers/all-MiniLM-L6-v2", "ft:"]
)
def test_any_other_name_is_refused(services, name):
    refused(services, name)


def test_a_path_of_a_model_that_is_allowed_under_a_name_is_no_name(services, tiny_model):
    refused(services, tiny_model)


def test_a_jobs_model_has_a_name_and_answers_to_the_jobs_id(services, adapter, tiny_model):
    job = succeeded_job(services, adapter, suffix="handbook")
    name = fine_tuned_model(job)
    assert name == f"ft:tiny:handbook:{job.id[6:14]}"
    served = ServedModel(tiny_model, str(services.settings.models_dir / job.id))
    assert services.models.find(name, "local") == services.models.find(job.id, "local") == served
    for wrong in (name.replace("handbook", "other"), name.swapcase(), name[:-1], name + "x", job.id[:14], job.id + "x"):
        refused(services, wrong)


def test_a_job_that_has_not_succeeded_has_no_model(services, adapter):
    from llama_index_lora_embed.service.jobs.state import JobSpec

    job, _ = services.jobs.create(JobSpec(owner="local", model="tiny", data="queries"))
    refused(services, fine_tuned_model(job))


def test_the_model_of_a_job_is_its_owners_and_an_admins(services, adapter):
    job = succeeded_job(services, adapter, owner="token-1")
    name = fine_tuned_model(job)
    refused(services, name, "token-2")
    refused(services, job.id, "token-2")
    assert services.models.find(name, "token-1") == services.models.find(name, None)
    refused(services, name, "token-2")  # also once the model is known
    assert [card.name for card in services.models.cards("token-2")] == ["tiny"]
    assert [card.name for card in services.models.cards("token-1")] == ["tiny", name]


def test_the_model_of_a_base_that_is_no_longer_allowed_is_refused(services, adapter):
    job = succeeded_job(services, adapter)
    services.models.registry("handbook").add(services.settings.models_dir / job.id)
    services.settings.allowed_models.clear()
    for name in ("tiny", job.id, "handbook@v1"):
        refused(services, name)
    assert list(services.models.cards("local")) == []


def test_an_adapter_is_the_version_in_use_and_each_of_its_versions(services, adapter, tiny_model):
    paths = [str(services.settings.models_dir / succeeded_job(services, adapter).id) for _ in range(2)]
    registry = services.models.registry("handbook")
    for path in paths:
        registry.add(path)
    refused(services, "handbook")
    registry.promote("v2")
    assert services.models.find("handbook", "anybody") == ServedModel(tiny_model, paths[1])
    assert services.models.find("handbook@v1", "anybody") == ServedModel(tiny_model, paths[0])
    for wrong in ("handbook@v3", "handbook@", "../handbook@v1", "handbook/../handbook@v1", "handbook@v1@v1"):
        refused(services, wrong)
    names = [(card.name, card.parent) for card in services.models.cards("anybody")]
    assert names == [("tiny", None), ("handbook@v1", "tiny"), ("handbook@v2", "tiny"), ("handbook", "tiny")]


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a" * 65, "tiny", "ü", "a\0", "a\n"])
def test_names_that_are_no_folders_of_adapters_are_refused(services, name):
    with pytest.raises(ServiceError, match="for an adapter"):
        services.models.registry(name)


def test_a_side_may_stand_at_the_end_of_a_name():
    assert side_of("ft:tiny::a-query") == ("ft:tiny::a", "query")
    assert side_of("tiny-passage") == ("tiny", "passage")
    assert side_of("my-query-model") == ("my-query-model", None)
