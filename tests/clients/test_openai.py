"""Somebody else's clients drive the service: `openai`, LlamaIndex's OpenAI-like embedding class, LiteLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from openai import BadRequestError, NotFoundError, OpenAI

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.models import fine_tuned_model
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.conftest import make_dataset
from tests.helpers.adapters import distance
from tests.helpers.openai_loop import TEXTS, fine_tune_and_embed, finished
from tests.helpers.running_service import running_service, served
from tests.helpers.service import pairs_of, succeeded_job

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    with running_service(tmp_path_factory.mktemp("service"), tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def training_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs_of()))
    return path


@pytest.fixture(scope="module")
def client(service):
    return OpenAI(base_url=f"{service.url}/v1", api_key=service.token)


@pytest.fixture(scope="module")
def loop(client, training_file):
    return fine_tune_and_embed(client, str(training_file))


@pytest.fixture(scope="module")
def lora_embedding(loop, service):
    return LoraEmbedding(service.settings.models_dir / loop["job"]["id"], device="cpu")


def check_loop(loop, service, tiny_model):
    """What the loop saw is what happened."""
    job = loop["job"]
    assert (job["object"], job["model"], job["seed"], job["metadata"]) == (
        "fine_tuning.job",
        "tiny",
        3,
        {"team": "docs"},
    )
    assert job["fine_tuned_model"] == f"ft:tiny:handbook:{job['id'][6:14]}"
    assert job["hyperparameters"] == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 5.0}
    assert job["training_file"] == loop["file"]["id"]
    assert job["created_at"] <= job["finished_at"]
    assert loop["file"]["status"] == "processed"
    assert loop["events"][-1] == f"Created fine-tuning job: {job['id']}"
    assert "successfully completed" in loop["events"][0]
    assert any("training loss=" in message for message in loop["events"])
    assert loop["checkpoints"] == sorted(loop["checkpoints"], reverse=True) != []
    embed_model = LoraEmbedding(service.settings.models_dir / job["id"], device="cpu")
    expected = embed_model.get_text_embedding_batch(TEXTS)
    assert distance(loop["vectors"], expected) < 1e-5
    assert distance(loop["floats"], expected) < 1e-5
    step = service.settings.models_dir / f"{job['id']}.run.step-{loop['checkpoints'][0]}"
    assert distance(loop["checkpoint"], LoraEmbedding(step, device="cpu").get_text_embedding(TEXTS[0])) < 1e-5
    base = LoraEmbedding(base_model=tiny_model, device="cpu").get_text_embedding(TEXTS[0])
    assert distance(loop["base"], base) < 1e-5
    assert distance(loop["base"], expected[0]) > 1e-3
    assert loop["tokens"] == sum(len(text.split()) + 2 for text in TEXTS)
    assert {"tiny", job["fine_tuned_model"]} <= set(loop["models"])


def test_openais_client_uploads_trains_polls_and_embeds(loop, service, tiny_model):
    check_loop(loop, service, tiny_model)


def test_llama_indexs_openai_like_class_indexes_and_queries_as_lora_embedding_does(loop, service, lora_embedding):
    def embed_model(side):
        return OpenAILikeEmbedding(
            model_name=loop["job"]["fine_tuned_model"] + side,
            api_base=f"{service.url}/v1",
            api_key=service.token,
            embed_batch_size=7,
        )

    corpus = make_dataset(passages=20, seed=4).corpus
    nodes = [TextNode(id_=i, text=text) for i, text in corpus.items()]

    def retrieved(passages, queries):
        retriever = VectorStoreIndex(nodes, embed_model=passages).as_retriever(similarity_top_k=5, embed_model=queries)
        return [(found.node_id, found.score) for found in retriever.retrieve("w1 w2 w3 ?")]

    theirs = retrieved(embed_model("-passage"), embed_model("-query"))
    ours = retrieved(lora_embedding, lora_embedding)
    assert [i for i, _ in theirs] == [i for i, _ in ours]
    assert [score for _, score in theirs] == pytest.approx([score for _, score in ours], abs=1e-5)
    sent = OpenAILikeEmbedding(
        model_name=loop["job"]["fine_tuned_model"],
        api_base=f"{service.url}/v1",
        api_key=service.token,
        additional_kwargs={"extra_body": {"input_type": "query"}},
    )
    assert distance(sent.get_query_embedding("w1 w2"), lora_embedding.get_query_embedding("w1 w2")) < 1e-5


@pytest.mark.extended
def test_litellm_runs_the_loop(service, training_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")

    at = {"custom_llm_provider": "openai", "api_base": f"{service.url}/v1", "api_key": service.token}
    file = litellm.create_file(file=training_file.open("rb"), purpose="fine-tune", **at)
    job = litellm.create_fine_tuning_job(
        model="tiny",
        training_file=file.id,
        hyperparameters={"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 5},
        suffix="lite",
        **at,
    )
    openai = OpenAI(base_url=f"{service.url}/v1", api_key=service.token)
    assert finished(openai, job.id).status == "succeeded"
    ended = litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job.id, **at)
    name = ended.fine_tuned_model
    assert name.startswith("ft:tiny:lite:")
    answer = litellm.embedding(
        f"openai/{name}", input=TEXTS, api_base=f"{service.url}/v1", api_key=service.token, encoding_format="float"
    )
    expected = LoraEmbedding(service.settings.models_dir / job.id, device="cpu").get_text_embedding_batch(TEXTS)
    assert distance([item["embedding"] for item in answer.data], expected) < 1e-5


@pytest.mark.extended
def test_the_next_major_version_of_openais_client_runs_the_loop(service, training_file, tiny_model, tmp_path):
    """In a process of its own: openai 3 conflicts with llama-index-llms-openai."""
    target = tmp_path / "openai3"
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), "openai>=3,<4"]
    if subprocess.run(install, timeout=600).returncode:
        pytest.skip("openai 3 cannot be installed: no network")
    script = Path(__file__).parent.parent / "helpers" / "openai_loop.py"
    version = "import openai; print(openai.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    seen = subprocess.run([sys.executable, "-c", version], env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout.startswith("3.")
    done = subprocess.run(
        [sys.executable, str(script), f"{service.url}/v1", service.token, str(training_file)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_loop(json.loads(done.stdout), service, tiny_model)


class Faulty:
    """An application whose answers to the first POST requests to a path get lost: the client sees 503 instead."""

    def __init__(self, app, path, times):
        self.app, self.path, self.times, self.seen = app, path, times, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(self.path):
            self.seen += 1
            if self.seen <= self.times:
                return await self.app(scope, receive, self._lost(send))
        return await self.app(scope, receive, send)

    @staticmethod
    def _lost(send):
        async def lost(message):
            if message["type"] == "http.response.start":
                message = {**message, "status": 503}
            await send(message)

        return lost


@pytest.fixture
def app(tiny_model, tmp_path):
    return create_app(ServiceSettings(data_dir=tmp_path, auth="off", allowed_models={"tiny": tiny_model}, device="cpu"))


def test_a_create_whose_answer_was_lost_is_sent_again_and_gives_one_job(app, training_file):
    faulty = Faulty(app, "/jobs", times=2)
    with served(faulty) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        file = client.files.create(file=training_file, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        assert faulty.seen == 3
        assert [listed.id for listed in client.fine_tuning.jobs.list()] == [job.id]
        other = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, seed=7)
        assert other.id != job.id


def test_what_a_job_refuses_is_said_once_and_not_tried_again(app, adapter):
    faulty = Faulty(app, "/cancel", times=0)
    with served(faulty) as url:
        job = succeeded_job(app.state.services, adapter)
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == fine_tuned_model(job)
        with pytest.raises(BadRequestError, match="cannot be cancelled"):
            client.fine_tuning.jobs.cancel(job.id)
        assert faulty.seen == 1


def test_openais_client_deletes_a_model(app, adapter):
    with served(app) as url:
        name = fine_tuned_model(succeeded_job(app.state.services, adapter))
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        deleted = client.models.delete(name)
        assert (deleted.id, deleted.object, deleted.deleted) == (name, "model", True)
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(NotFoundError):
            client.models.retrieve(name)
