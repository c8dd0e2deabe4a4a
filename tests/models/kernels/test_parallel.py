"""A pass on each core at once: the same vectors, and nothing of it stays behind."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.embedding.encode import encode
from llama_index_lora_embed.models.kernels import parallel
from llama_index_lora_embed.models.kernels.parallel import parallel_passes
from tests.conftest import WORDS

TEXTS = [" ".join(WORDS[i % 9 : i % 9 + 1 + 7 * i % 15]) for i in range(300)]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def general_number():
    """Of torch's threads, for a thread that starts now."""
    found = []
    in_thread(lambda: found.append(torch.get_num_threads()))
    return found[0]


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
    assert general_number() == 3


def test_cores_are_shared_out_where_there_are_more_than_passes(model):
    before = torch.get_num_threads()
    torch.set_num_threads(17)
    try:
        seen, _ = passes_of(model, TEXTS * 3)
    finally:
        torch.set_num_threads(before)
    assert {threads for _, threads, _ in seen} == {2}


@pytest.mark.parametrize("texts", [TEXTS[:3], TEXTS[:11], [" ".join(WORDS) * 50]])
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
    assert parallel.passes_of(torch.device("cuda"), []) == 1


def test_models_that_change_in_a_pass_compute_one_at_a_time(three_threads):
    class BigBirdModel(nn.Module):
        """Changes its attention when it sees short texts."""

    class Rotary(nn.Module):
        rope_type = {"full_attention": "dynamic"}  # noqa: RUF012

    remote = type("Theirs", (nn.Module,), {"__module__": "transformers_modules.they.model"})
    cpu = torch.device("cpu")
    assert parallel.passes_of(cpu, [nn.Linear(2, 2)]) == 3
    for kind in (BigBirdModel, Rotary, remote):
        assert parallel.passes_of(cpu, [nn.Linear(2, 2), kind()]) == 1


def test_other_threads_keep_torchs_setting(three_threads):
    with parallel_passes(2) as passes:
        assert general_number() == 3
        passes.add(lambda: torch.tensor(torch.get_num_threads()))
        assert [int(n) for n in passes.results()] == [1]
    found = []

    def own_number():
        torch.set_num_threads(2)  # which torch makes the general one, too
        with parallel_passes(2) as passes:
            passes.add(lambda: torch.zeros(1))
        found.extend([torch.get_num_threads(), general_number()])

    in_thread(own_number)
    assert found == [2, 2]
    assert torch.get_num_threads() == 3


def test_a_caller_with_a_number_of_its_own_does_not_make_it_the_general_one(three_threads):
    torch.get_num_threads()
    in_thread(lambda: torch.set_num_threads(5))
    with parallel_passes(3) as passes:  # new threads, for there were none of this number
        passes.add(lambda: torch.zeros(1))
    assert (torch.get_num_threads(), general_number()) == (3, 5)


def test_what_a_pass_raises_is_raised_and_the_others_are_not_computed(three_threads):
    computed = []

    def fails():
        raise ValueError("no memory")

    def works():
        time.sleep(0.01)
        computed.append(1)
        return torch.zeros(1)

    def asked():
        with parallel_passes(2) as passes:
            for each in [fails, *[works] * 100]:
                passes.add(each)

    with pytest.raises(ValueError, match="no memory"):
        asked()
    assert len(computed) < 5
    before = len(computed)
    time.sleep(0.05)
    assert len(computed) == before, "nothing is computed when the block has ended"


def test_a_long_pass_has_all_cores(three_threads):
    with parallel_passes(3) as passes:
        passes.add(lambda: torch.tensor(torch.get_num_threads()))
        passes.add(lambda: torch.tensor(torch.get_num_threads()), alone=True)
        passes.add(lambda: torch.tensor(torch.get_num_threads()))
        assert [int(n) for n in passes.results()] == [1, 3, 1]


def test_no_more_are_waiting_than_there_are_threads():
    running, most = [], []

    def works():
        running.append(1)
        time.sleep(0.001)
        return torch.zeros(1)

    with parallel_passes(2) as passes:
        for asked in range(1, 30):
            passes.add(works)
            most.append(asked - len(passes._made))
        assert len(passes.results()) == 29
    assert max(most) <= 3


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_system_without_more_threads_computes_in_the_one_that_asked(model, three_threads, monkeypatch, failing):
    expected = encode(model, TEXTS, "document")
    parallel._forget()
    start, begun = threading.Thread.start, []

    def few(self):
        begun.append(self)
        if len(begun) == failing:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", few)
    seen, vectors = passes_of(model, TEXTS)
    assert {name for name, _, _ in seen} == {threading.current_thread().name}
    assert np.abs(vectors - expected).max() < 1e-6
    monkeypatch.undo()
    assert (torch.get_num_threads(), general_number()) == (3, 3)


def test_ctrl_c_while_threads_start_ends_them(three_threads, monkeypatch):
    parallel._forget()
    submit = ThreadPoolExecutor.submit
    asked = []

    def interrupted(self, *args):
        asked.append(self)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return submit(self, *args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt), parallel_passes(3):
        pass
    monkeypatch.undo()
    asked[0].shutdown()  # which would wait for ever for one that waits
    assert general_number() == 3
    with parallel_passes(3) as passes:
        passes.add(lambda: torch.zeros(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_was_forked_has_threads_of_its_own(three_threads):
    with parallel_passes(3) as passes:
        passes.add(lambda: torch.zeros(1))
    child = os.fork()
    if child == 0:
        with parallel_passes(3) as passes:
            passes.add(lambda: torch.ones(1))
            os._exit(int(passes.results()[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_thread_that_outlives_the_main_one_computes_to_its_end():
    code = """
import threading, time, torch
torch.set_num_threads(3)
from llama_index_lora_embed.models.kernels.parallel import parallel_passes
def work():
    with parallel_passes(3) as passes:
        for n in range(20):
            passes.add(lambda: torch.zeros(1))
            time.sleep(0.02)
        print(len(passes.results()))
threading.Thread(target=work).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["20"], done.stderr


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
