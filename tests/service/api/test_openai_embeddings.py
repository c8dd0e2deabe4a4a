"""/v1/embeddings and /v1/models over HTTP."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.service.models import fine_tuned_model
from tests.conftest import WORDS, make_engine
from tests.helpers.adapters import TEXTS, distance
from tests.helpers.service import succeeded_job

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tuned(client, adapter):
    return fine_tuned_model(succeeded_job(client.app.state.services, adapter, suffix="handbook"))


@pytest.fixture(scope="module")
def lora_embedding(adapter):
    return LoraEmbedding(adapter, device="cpu")


def embed(client, **body):
    answer = client.post("/v1/embeddings", json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client, status=400, **body):
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": "w1", **body})
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_vectors_are_lora_embeddings_in_openais_object(client, tuned, lora_embedding):
    answer = embed(client, model=tuned, input=TEXTS)
    assert (answer["object"], answer["model"]) == ("list", tuned)
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", i) for i in range(len(TEXTS))]
    vectors = [item["embedding"] for item in answer["data"]]
    assert distance(vectors, lora_embedding.get_text_embedding_batch(TEXTS)) < 1e-5
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == sum(len(t.split()) + 2 for t in TEXTS)


def test_one_text_needs_no_list(client, tiny_model):
    (item,) = embed(client, input="w1 w2")["data"]
    assert (
        distance(item["embedding"], LoraEmbedding(base_model=tiny_model, device="cpu").get_text_embedding("w1 w2"))
        < 1e-5
    )


def test_base64_is_of_little_endian_float32(client):
    plain, packed = (embed(client, input=["w1", "w2 w3"], encoding_format=f)["data"] for f in ("float", "base64"))
    for one, other in zip(plain, packed, strict=True):
        assert np.frombuffer(base64.b64decode(other["embedding"]), "<f4").tolist() == one["embedding"]


@pytest.fixture(scope="module")
def prompted(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "prompted"
    settings = {"epochs": 1, "val_dataset": None, "val_fraction": 0.0}
    make_engine(tiny_model, path, query_prompt="query : ", passage_prompt="passage : ", **settings).finetune()
    return path


@pytest.mark.parametrize("how", ["field", "name"])
@pytest.mark.parametrize("side", ["query", "passage"])
def test_the_side_is_a_field_or_at_the_end_of_the_name(client, prompted, side, how):
    model = fine_tuned_model(succeeded_job(client.app.state.services, prompted))
    body = {"model": model, "input_type": side} if how == "field" else {"model": f"{model}-{side}"}
    (item,) = embed(client, input="w1 w2", **body)["data"]
    alone = LoraEmbedding(prompted, device="cpu")
    by_side = {"query": alone.get_query_embedding("w1 w2"), "passage": alone.get_text_embedding("w1 w2")}
    assert distance(item["embedding"], by_side[side]) < 1e-5
    assert distance(by_side["query"], by_side["passage"]) > 1e-3
    if side == "passage":
        (item,) = embed(client, input="w1 w2", model=model)["data"]
        assert distance(item["embedding"], by_side["passage"]) < 1e-5, "passages where nothing says it"


def test_two_sides_that_contradict_each_other_are_refused(client):
    assert "'query'" in refused(client, model="tiny-query", input_type="passage")["message"]


def test_dimensions_are_cut_as_by_truncate_dim_and_more_than_the_models_are_refused(client, tiny_model):
    (item,) = embed(client, input="w1 w2", dimensions=8)["data"]
    alone = LoraEmbedding(base_model=tiny_model, truncate_dim=8, device="cpu")
    assert distance(item["embedding"], alone.get_text_embedding("w1 w2")) < 1e-5
    assert "at most 32" in refused(client, dimensions=33)["message"]
    refused(client, dimensions=0)


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2], [3]]])
def test_lists_of_tokens_are_refused_with_the_reason(client, tokens):
    assert "OpenAI's tokenizer" in refused(client, input=tokens)["message"]


@pytest.mark.parametrize("given", [[], None, {}, 3, [[]], ["w1", None], ["w1", 3], [["w1"]], [True, "w1"]])
def test_anything_but_texts_is_refused(client, given):
    assert refused(client, input=given)["param"] == "input"


def test_requests_beyond_the_limits_are_refused_before_they_are_computed(client):
    assert "2049 texts" in refused(client, input=["w1"] * 2049)["message"]
    assert "2000001 characters" in refused(client, input="a" * 2_000_001)["message"]


def test_an_empty_text_is_a_text_and_truncated_ones_are_counted(client, tiny_model):
    answer = embed(client, input=["", " ".join(WORDS)])
    vectors = LoraEmbedding(base_model=tiny_model, device="cpu").get_text_embedding_batch(["", " ".join(WORDS)])
    assert distance([item["embedding"] for item in answer["data"]], vectors) < 1e-5
    assert answer["truncated_texts"] == 1


def test_unknown_models_are_named(client):
    error = refused(client, status=404, model="gpt-4")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt-4'" in error["message"]


def test_an_adapter_that_is_damaged_is_reported_without_the_folders_of_the_server(client, tuned, tiny_model):
    settings = client.app.state.services.settings
    (folder,) = settings.models_dir.iterdir()
    (folder / "adapter_config.json").write_text("{}")
    message = refused(client, model=tuned)["message"]
    assert f"<data>/models/{folder.name}" in message
    assert str(settings.folder) not in message
    assert tiny_model not in message


def test_wrong_values_are_named(client):
    assert refused(client, encoding_format="int8")["param"] == "encoding_format"
    assert refused(client, input_type="document")["param"] == "input_type"
    assert refused(client, model=None)["param"] == "model"
