"""Inside LlamaIndex's `RayIngestionPipeline`: the same vectors and queries, in order, whatever fails."""

import time

import numpy as np
import pytest
import ray
from llama_index.core import Document
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode, TextNode, TransformComponent

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import ConfigError, LLMError
from llama_index_lora_embed.data import LLMQueryGenerator
from llama_index_lora_embed.data.llm.journal import Journal
from llama_index_lora_embed.data.questions.base import attached_queries
from llama_index_lora_embed.distributed import ray_transform
from llama_index_lora_embed.distributed.ingestion import ERROR_KEY
from tests.conftest import WORDS
from tests.helpers.killing import FailingEmbedding, KillingLLM, die_once
from tests.helpers.llms import FAST, FakeLLM, journalled

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.usefixtures("cluster")]


def pipeline_of(*steps):
    from llama_index.ingestion.ray import RayIngestionPipeline

    return RayIngestionPipeline(transformations=list(steps))


def test_an_ingestion_pipeline_of_ray_gives_the_same_vectors(adapter):
    from llama_index.ingestion.ray import RayTransformComponent

    batches = {"batch_size": 10, "concurrency": 1}
    pipeline = pipeline_of(
        RayTransformComponent(SentenceSplitter, batches, {"chunk_size": 64, "chunk_overlap": 0}),
        RayTransformComponent(LoraEmbedding, batches, {"adapter_path": str(adapter), "device": "cpu"}),
    )
    nodes = pipeline.run(documents=[Document(text=" ".join(WORDS[i:])) for i in range(20)])
    assert len(nodes) >= 20
    texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
    expected = LoraEmbedding(adapter, device="cpu").get_text_embedding_batch(texts)
    assert np.abs(np.array([node.embedding for node in nodes]) - expected).max() < 1e-5


def test_an_embedding_model_can_be_handed_to_an_actor(adapter):
    @ray.remote
    class Searcher:
        def __init__(self, embed_model):
            self.embed_model = embed_model

        def ask(self, query):
            return self.embed_model.fingerprint, self.embed_model.get_query_embedding(query)

    embed_model = LoraEmbedding(adapter, device="cpu")
    fingerprint, vector = ray.get(Searcher.remote(embed_model).ask.remote("w1 w2"))
    assert fingerprint == embed_model.fingerprint
    assert vector == pytest.approx(embed_model.get_query_embedding("w1 w2"), abs=1e-6)


class Dawdling(TransformComponent):
    """Takes the longer the earlier a node is, notes how many nodes it got, and takes no `show_progress`."""

    ballast: str = ""
    folder: str = ""

    def __call__(self, nodes):
        if any(node.node_id == "n50" for node in nodes):
            die_once(self.folder, "n50")
        time.sleep(0.3 if nodes[0].node_id == "n0" else 0)
        for node in nodes:
            node.metadata["batch"] = len(nodes)
        return nodes


def test_order_and_batches_are_kept_and_large_arguments_survive_a_restart(tmp_path):
    nodes = [TextNode(id_=f"n{i}", text=f"text {i}", embedding=[1.0, i]) for i in range(100)]
    step = ray_transform(Dawdling(ballast="x" * 300_000, folder=str(tmp_path)), num_workers=2, batch_size=10)
    done = pipeline_of(step).run(nodes=nodes, show_progress=True)
    assert (tmp_path / "n50").exists(), "a worker was killed"
    assert [node.node_id for node in done] == [node.node_id for node in nodes]
    assert {node.metadata["batch"] for node in done} == {10}
    assert all(node.embedding == [1.0, i] for i, node in enumerate(nodes)), "the caller's nodes keep their vectors"


def test_a_node_that_a_step_fails_for_is_passed_on_with_the_error():
    nodes = [TextNode(id_=f"n{i}", text=text) for i, text in enumerate(["one", "a bad one", "three"])]
    done = pipeline_of(ray_transform(FailingEmbedding())).run(nodes=nodes)
    assert [node.embedding for node in done] == [[3.0, 1.0], None, [5.0, 1.0]]
    assert done[1].metadata[ERROR_KEY] == "ValueError: a bad text"
    assert done[1].get_content(metadata_mode=MetadataMode.EMBED) == "a bad one"


def test_a_killed_worker_pays_for_no_answer_twice_and_the_journal_is_free_afterwards(tmp_path):
    (tmp_path / "killed").mkdir()
    llm = KillingLLM(marks=["w3", "w11"], folder=str(tmp_path / "killed"))
    journal = tmp_path / "journal.jsonl"
    generator = LLMQueryGenerator(llm, journal=journal, settings=FAST.replace(in_flight=1))
    nodes = [TextNode(id_=f"n{i}", text=f"{WORDS[i]} is described in this passage.") for i in range(16)]
    pipeline = pipeline_of(ray_transform(generator, num_workers=2, batch_size=8))
    done = pipeline.run(nodes=nodes)
    ledger = (tmp_path / "killed" / "ledger").read_text().splitlines()
    assert len(list((tmp_path / "killed").iterdir())) == 3
    assert len(ledger) == len(set(ledger)) == len(journalled(journal)) == 16
    assert [len(attached_queries(node)) for node in done] == [2] * 16
    del pipeline
    deadline = time.monotonic() + 30
    while True:
        try:
            return Journal(journal).close()
        except Exception:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_what_cannot_travel_and_what_is_no_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size=0"):
        ray_transform(FailingEmbedding(), batch_size=0)
    with pytest.raises(ConfigError, match="transform: "), open(tmp_path / "file", "w") as file:
        ray_transform(lambda: file)


def test_a_dead_llm_ends_the_pipeline(tmp_path):
    llm = FakeLLM(answers=[ConnectionError("no route to host")])
    generator = LLMQueryGenerator(llm, journal=tmp_path / "j.jsonl", settings=FAST.replace(attempts=1))
    nodes = [TextNode(text=f"text {i}") for i in range(20)]
    with pytest.raises(Exception, match="no route to host") as caught:
        pipeline_of(ray_transform(generator)).run(nodes=nodes)
    assert LLMError.__name__ in str(caught.value)
