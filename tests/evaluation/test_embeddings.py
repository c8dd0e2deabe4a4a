import asyncio
import os
import signal
import threading
import time

import numpy as np
import pytest
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import evaluate_retrieval
from llama_index_lora_embed.core import concurrency
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.evaluation import aevaluate_retrieval
from llama_index_lora_embed.evaluation.embeddings import Embedder
from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders
from tests.conftest import make_dataset
from tests.helpers.evaluation import WordCountEmbedding


class Client(WordCountEmbedding):
    """Like API clients, it has connections that belong to the event loop of their first use."""

    _loops: set = PrivateAttr(default_factory=set)

    async def _under_way(self, value):
        self._loops.add(id(asyncio.get_running_loop()))
        return await super()._under_way(value)


def test_all_requests_of_a_client_run_in_one_event_loop():
    model, dataset = Client(embed_batch_size=5), make_dataset(passages=8)
    for _ in range(2):
        evaluate_retrieval(model, dataset, num_workers=3)
    assert len(model._loops) == 1

    async def loops():
        await aevaluate_retrieval(model := Client(), dataset)
        return model._loops, {id(asyncio.get_running_loop())}

    used, running = asyncio.run(loops())
    assert used == running


def test_nested_synchronous_calls_are_refused_and_the_loop_survives():
    async def inside():
        return evaluate_retrieval(WordCountEmbedding(), make_dataset(passages=4), num_workers=2)

    with pytest.raises(ConfigError, match="Await aevaluate_retrieval"):
        concurrency.run_async(inside())

    async def exits():
        raise SystemExit

    with pytest.raises(SystemExit):
        concurrency.run_async(exits())
    assert evaluate_retrieval(WordCountEmbedding(), make_dataset(passages=4), num_workers=2).passages == 4


def test_an_interrupt_cancels_waiting_requests(monkeypatch):
    model, dataset = Client(), make_dataset()
    requested = threading.Event()

    async def slow(self, value):
        requested.set()
        self._running[0] += 1
        await asyncio.sleep(0.2)
        return value

    monkeypatch.setattr(Client, "_under_way", slow)

    def interrupt():
        requested.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        evaluate_retrieval(model, dataset, num_workers=2)
    time.sleep(0.5)
    assert model._running[0] <= 6, "of 48"


def test_wrong_models_and_vectors_of_different_lengths_are_refused():
    class Ragged(WordCountEmbedding):
        def vector(self, text):
            return [1.0] * len(text)

    with pytest.raises(ConfigError, match="different dimensions"):
        evaluate_retrieval(Ragged(), make_dataset())
    for wrong in (None, "a-model", WordCountEmbedding):
        with pytest.raises(ConfigError, match="a LlamaIndex BaseEmbedding"):
            evaluate_retrieval(wrong, make_dataset())
    for wrong in (0, True, "2"):
        with pytest.raises(ConfigError, match="num_workers"):
            evaluate_retrieval(WordCountEmbedding(), make_dataset(), num_workers=wrong)


@pytest.mark.parametrize("num_workers", [None, 2])
def test_a_model_that_drops_texts_is_refused(num_workers):
    class Skips(WordCountEmbedding):
        def _get_text_embeddings(self, texts):
            return super()._get_text_embeddings(texts)[:-1]

    with pytest.raises(ConfigError, match="9 vectors for 10 texts from Skips"):
        evaluate_retrieval(Skips(), make_dataset(), num_workers=num_workers)
    with pytest.raises(ConfigError, match=r"query vectors of shape \(47, 3\)"):
        evaluate_encoders(lambda t: np.ones((len(t) - 1, 3)), lambda t: np.ones((len(t), 3)), make_dataset())


@pytest.mark.parametrize("side", ["query", "passage"])
def test_hugging_face_models_get_all_texts_at_once_and_order_them_by_length(side, tiny_model, monkeypatch):
    model = HuggingFaceEmbedding(
        model_name=str(tiny_model), device="cpu", query_instruction="query: ", text_instruction="passage: "
    )
    texts = [" ".join(f"w{n}" for n in range(1 + 7 * i % 12)) for i in range(40)]
    singly = [model.get_query_embedding(t) if side == "query" else model.get_text_embedding(t) for t in texts]
    calls, encode = [], SentenceTransformer.encode

    def counted(self, inputs, *args, **kwargs):
        calls.append(len(inputs))
        return encode(self, inputs, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", counted)
    vectors = concurrency.run_async(Embedder(model, None, None, False).embed(texts, side), suspends=False)
    np.testing.assert_allclose(vectors, singly, atol=1e-6)
    assert calls == [len(set(texts))]
    assert model.embed_batch_size == 10, "the user's model stays as it is"
