"""A pass on each core at once: the same vectors, and nothing of it stays behind."""

import threading
import time

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding, cores
from llama_index_lora_embed.cores import passes_at_once
from llama_index_lora_embed.encoding import encode
from tests.conftest import WORDS

TEXTS = [" ".join(WORDS[i % 9 : i % 9 + 1 + 7 * i % 15]) for i in range(150)]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(adapter):
    return SentenceTransformer(str(adapter), device="cpu")


def passes_of(model, texts, **settings):
    """Thread, torch's threads in it and rows of each forward pass, and the vectors."""
    seen = []

    def note(_, inputs):
        seen.append((threading.current_thread().name, torch.get_num_threads(), len(inputs[0]["input_ids"])))

    hook = model[0].register_forward_pre_hook(note)
    try:
        return seen, encode(model, texts, "document", **settings)
    finally:
        hook.remove()


@pytest.mark.parametrize("most_tokens", [None, 48, 400])
def test_vectors_are_those_of_sentence_transformers_in_the_order_of_the_texts(model, three_threads, most_tokens):
    seen, vectors = passes_of(model, TEXTS, most_tokens=most_tokens)
    assert np.abs(vectors - model.encode_document(TEXTS)).max() < 1e-5
    assert len({name for name, _, _ in seen}) > 1
    assert {threads for _, threads, _ in seen} == {1}
    assert sum(rows for *_, rows in seen) == len(TEXTS)
    assert torch.get_num_threads() == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embed")]


def test_few_passes_share_all_cores(model):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        seen, vectors = passes_of(model, [" ".join(WORDS) * 6] * 8)
    finally:
        torch.set_num_threads(before)
    assert {threads for _, threads, _ in seen} == {2}
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-6


@pytest.mark.parametrize("texts", [TEXTS[:3], [" ".join(WORDS) * 50]])
def test_little_text_is_computed_where_it_was_asked_for(model, three_threads, texts):
    seen, _ = passes_of(model, texts)
    assert seen == [(threading.current_thread().name, 3, len(texts))]


def test_there_is_one_thread_where_it_would_not_be_the_same(model, three_threads):
    for context, settings in (
        (torch.inference_mode(), {"fused": False}),
        (torch.autocast("cpu", dtype=torch.bfloat16), {}),
    ):
        with context:
            seen, _ = passes_of(model, TEXTS, **settings)
        assert {name for name, _, _ in seen} == {threading.current_thread().name}
    assert cores.cores(torch.device("cuda")) == 1


def test_a_thread_that_starts_later_has_torchs_setting(model, three_threads):
    found = []
    with passes_at_once(2) as passes:
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        passes.add(lambda: torch.tensor(torch.get_num_threads()))
        assert [int(n) for n in passes.results()] == [1]
    assert found == [3]


def test_what_a_pass_raises_is_raised_and_the_others_are_not_computed(three_threads):
    computed = []

    def fails():
        raise ValueError("no memory")

    def works():
        time.sleep(0.01)
        computed.append(1)
        return torch.zeros(1)

    def asked():
        with passes_at_once(2) as passes:
            for each in [fails, *[works] * 100]:
                passes.add(each)

    with pytest.raises(ValueError, match="no memory"):
        asked()
    assert len(computed) < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embed")]


def test_no_more_are_waiting_than_there_are_threads():
    running, most = [], []

    def works():
        running.append(1)
        time.sleep(0.001)
        return torch.zeros(1)

    with passes_at_once(2) as passes:
        for asked in range(1, 30):
            passes.add(works)
            most.append(asked - len(passes._made))
        assert len(passes.results()) == 29
    assert max(most) <= 3


def test_a_system_without_more_threads_computes_in_the_one_that_asked(model, three_threads, monkeypatch):
    expected = encode(model, TEXTS, "document")
    start, begun = threading.Thread.start, []

    def few(self):
        begun.append(self)
        if len(begun) > 1:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", few)
    seen, vectors = passes_of(model, TEXTS)
    assert {name for name, _, _ in seen} == {threading.current_thread().name}
    assert np.abs(vectors - expected).max() < 1e-6
    assert torch.get_num_threads() == 3


def test_many_callers_at_once_get_their_own_vectors(adapter, three_threads):
    embed_model = LoraEmbedding(adapter, device="cpu")
    expected = np.array(embed_model.get_text_embedding_batch(TEXTS))
    found = {}

    def call(n):
        found[n] = embed_model.model_copy().get_text_embedding_batch(TEXTS[n:] + TEXTS[:n])

    threads = [threading.Thread(target=call, args=(n,)) for n in (0, 20, 40, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, vectors in found.items():
        assert np.abs(np.roll(expected, -n, axis=0) - vectors).max() < 1e-5
    assert len(found) == 4
    assert torch.get_num_threads() == 3
