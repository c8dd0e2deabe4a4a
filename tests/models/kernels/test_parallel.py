"""Parallel passes give the vectors of one pass at a time, and leave torch's number of threads as it was."""

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
from llama_index_lora_embed.models.kernels.parallel import max_parallel_passes, parallel_passes
from tests.conftest import WORDS

TEXTS = [" ".join(WORDS[i % 9 : i % 9 + 1 + 7 * i % 15]) for i in range(300)]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def run_in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def process_wide_threads():
    """Torch's number of threads in a thread that starts now."""
    found = []
    run_in_thread(lambda: found.append(torch.get_num_threads()))
    return found[0]


@pytest.fixture(scope="module")
def model(adapter):
    return SentenceTransformer(str(adapter), device="cpu")


def passes_and_vectors(model, texts, **settings):
    """Thread, torch's number of threads and rows of each forward pass, and the vectors."""
    seen = []

    def note(_, inputs):
        seen.append((threading.current_thread().name, torch.get_num_threads(), len(inputs[0]["input_ids"])))

    hook = model[0].register_forward_pre_hook(note)
    try:
        return seen, encode(model, texts, "document", **settings)
    finally:
        hook.remove()


@pytest.mark.parametrize("max_tokens", [None, 48, 400])
def test_parity_with_torch_in_the_order_of_the_texts(model, three_threads, max_tokens):
    seen, vectors = passes_and_vectors(model, TEXTS, max_tokens=max_tokens)
    assert np.abs(vectors - model.encode_document(TEXTS)).max() < 1e-5
    assert len({name for name, _, _ in seen}) > 1
    assert {threads for _, threads, _ in seen} == {1}
    assert sum(rows for *_, rows in seen) == len(TEXTS)
    assert torch.get_num_threads() == 3
    assert process_wide_threads() == 3


def test_threads_beyond_the_most_passes_are_divided_among_them(model):
    before = torch.get_num_threads()
    torch.set_num_threads(17)
    try:
        seen, _ = passes_and_vectors(model, TEXTS * 3)
    finally:
        torch.set_num_threads(before)
    assert {threads for _, threads, _ in seen} == {2}


@pytest.mark.parametrize("texts", [TEXTS[:3], TEXTS[:11], [" ".join(WORDS) * 50]])
def test_little_text_stays_in_the_calling_thread(model, three_threads, texts):
    seen, _ = passes_and_vectors(model, texts)
    assert seen == [(threading.current_thread().name, 3, len(texts))]


def test_autocast_and_unfused_encoding_stay_in_the_calling_thread(model, three_threads):
    for context, settings in (
        (torch.inference_mode(), {"fused": False}),
        (torch.autocast("cpu", dtype=torch.bfloat16), {}),
    ):
        with context:
            seen, _ = passes_and_vectors(model, TEXTS, **settings)
        assert {name for name, _, _ in seen} == {threading.current_thread().name}
    assert max_parallel_passes(torch.device("cuda"), []) == 1


def test_models_that_a_pass_may_change_compute_one_pass_at_a_time(three_threads):
    class BigBirdModel(nn.Module):
        """A model that changes its attention for short texts."""

    class Rotary(nn.Module):
        rope_type = {"full_attention": "dynamic"}  # noqa: RUF012

    remote = type("Theirs", (nn.Module,), {"__module__": "transformers_modules.they.model"})
    cpu = torch.device("cpu")
    assert max_parallel_passes(cpu, [nn.Linear(2, 2)]) == 3
    for kind in (BigBirdModel, Rotary, remote):
        assert max_parallel_passes(cpu, [nn.Linear(2, 2), kind()]) == 1


def test_other_threads_keep_their_number_of_threads(three_threads):
    with parallel_passes(2) as passes:
        assert process_wide_threads() == 3
        passes.add(lambda: torch.tensor(torch.get_num_threads()))
        assert [int(n) for n in passes.results()] == [1]
    found = []

    def own_number():
        torch.set_num_threads(2)  # torch sets the process-wide number, too
        with parallel_passes(2) as passes:
            passes.add(lambda: torch.zeros(1))
        found.extend([torch.get_num_threads(), process_wide_threads()])

    run_in_thread(own_number)
    assert found == [2, 2]
    assert torch.get_num_threads() == 3


def test_a_callers_own_number_of_threads_does_not_become_process_wide(three_threads):
    torch.get_num_threads()
    run_in_thread(lambda: torch.set_num_threads(5))
    with parallel_passes(3) as passes:  # a new pool, since none had this number
        passes.add(lambda: torch.zeros(1))
    assert (torch.get_num_threads(), process_wide_threads()) == (3, 5)


def test_an_error_in_a_pass_is_raised_and_the_passes_after_it_are_cancelled(three_threads):
    computed = []

    def fails():
        raise ValueError("no memory")

    def works():
        time.sleep(0.01)
        computed.append(1)
        return torch.zeros(1)

    def run():
        with parallel_passes(2) as passes:
            for each in [fails, *[works] * 100]:
                passes.add(each)

    with pytest.raises(ValueError, match="no memory"):
        run()
    assert len(computed) < 5
    before = len(computed)
    time.sleep(0.05)
    assert len(computed) == before, "no pass runs after the block has ended"


def test_a_pass_alone_has_all_threads(three_threads):
    with parallel_passes(3) as passes:
        passes.add(lambda: torch.tensor(torch.get_num_threads()))
        passes.add(lambda: torch.tensor(torch.get_num_threads()), alone=True)
        passes.add(lambda: torch.tensor(torch.get_num_threads()))
        assert [int(n) for n in passes.results()] == [1, 3, 1]


def test_no_more_than_one_pass_waits():
    running, most = [], []

    def works():
        running.append(1)
        time.sleep(0.001)
        return torch.zeros(1)

    with parallel_passes(2) as passes:
        for asked in range(1, 30):
            passes.add(works)
            most.append(asked - len(passes._results))
        assert len(passes.results()) == 29
    assert max(most) <= 3


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_the_calling_thread_computes_if_no_thread_can_be_started(model, three_threads, monkeypatch, failing):
    expected = encode(model, TEXTS, "document")
    parallel._forget_pools()
    start, begun = threading.Thread.start, []

    def few(self):
        begun.append(self)
        if len(begun) == failing:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", few)
    seen, vectors = passes_and_vectors(model, TEXTS)
    assert {name for name, _, _ in seen} == {threading.current_thread().name}
    assert np.abs(vectors - expected).max() < 1e-6
    monkeypatch.undo()
    assert (torch.get_num_threads(), process_wide_threads()) == (3, 3)


def test_ctrl_c_while_threads_start_ends_the_threads(three_threads, monkeypatch):
    parallel._forget_pools()
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
    asked[0].shutdown()  # would block forever on a thread that still waits
    assert process_wide_threads() == 3
    with parallel_passes(3) as passes:
        passes.add(lambda: torch.zeros(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_computes_in_its_own_threads(three_threads):
    with parallel_passes(3) as passes:
        passes.add(lambda: torch.zeros(1))
    child = os.fork()
    if child == 0:
        if torch.get_num_threads() != 1:
            os._exit(2)
        with parallel_passes(1) as passes:
            passes.add(lambda: torch.ones(1))
            os._exit(int(passes.results()[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_thread_that_outlives_the_main_thread_computes_all_its_passes():
    code = """
import threading, time, torch
torch.set_num_threads(3)
from llama_index_lora_embed.models.kernels.parallel import max_parallel_passes, parallel_passes
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


def test_concurrent_callers_get_their_own_vectors(adapter, three_threads):
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
