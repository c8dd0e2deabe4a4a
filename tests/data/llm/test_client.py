import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.rate_limiter import BaseRateLimiter
from llama_index.core.schema import TextNode

from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.core.errors import ConfigError, LLMError
from llama_index_lora_embed.data import dataset_from_nodes
from llama_index_lora_embed.data.llm.identity import llm_identity
from tests.helpers.llms import Blocking, FakeLLM, Structured, calm_answer, generator, journalled, some_nodes


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "journal.jsonl")


def test_no_more_requests_are_in_flight_than_allowed(journal):
    llm = FakeLLM(latency=0.02)
    list(generator(llm, journal, settings=LLMSettings(in_flight=5, show_progress=False)).generate(some_nodes(20)))
    assert llm.most_at_once == 5


def test_the_identity_of_an_llm_has_no_key_and_no_address():
    class Keyed(FakeLLM):
        api_key: str = "secret"
        api_base: str = "http://a"
        temperature: float = 0.1
        max_retries: int = 3
        additional_kwargs: dict = {}  # noqa: RUF012

    assert llm_identity(Keyed(api_key="one")) == llm_identity(Keyed(api_key="two", api_base="http://b"))
    assert llm_identity(Keyed()) != llm_identity(Keyed(temperature=0.9))
    headers = [Keyed(additional_kwargs={"extra_headers": {"Authorization": who}, "n": 1}) for who in "ab"]
    assert llm_identity(headers[0]) == llm_identity(headers[1])
    assert llm_identity(headers[0]) != llm_identity(Keyed(additional_kwargs={"n": 2}))


def test_two_nodes_with_the_same_text_share_one_request(journal):
    llm = FakeLLM(latency=0.01)
    nodes = [TextNode(text="The same text in two nodes.", id_=f"n{i}") for i in range(2)]
    llm_generator = generator(llm, journal, settings=LLMSettings(in_flight=1, show_progress=False))
    queries = list(llm_generator.generate(nodes))
    assert llm.calls == 1
    assert len(queries) == 4
    assert llm_generator.report.from_journal == 0, "no earlier run has answered it"


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "I'm sorry, but I can't help with that.",
        "## %% @@ << >>",
        ConnectionError("down"),
        ValueError("a returned exception object").__class__,
        CompletionResponse(text=""),
    ],
    ids=["empty", "refusal", "noise", "raises", "object", "blank"],
)
def test_a_request_with_a_bad_answer_is_sent_again(journal, bad):
    llm = FakeLLM(answers=[bad, "What is cleaned?"])
    llm_generator = generator(llm, journal, settings=LLMSettings(in_flight=1, backoff=0.001, show_progress=False))
    (query,) = llm_generator.generate(some_nodes(1))
    assert query.text == "What is cleaned?"
    assert llm.calls == 2
    assert llm_generator.report.unusable + llm_generator.report.errors == 1


def test_a_hanging_call_times_out_and_is_repeated(journal):
    class HangsOnce(FakeLLM):
        async def acomplete(self, prompt, formatted=False, **kwargs):
            self.calls += 1
            if self.calls == 1:
                await asyncio.sleep(60)
            return CompletionResponse(text=calm_answer(prompt))

    settings = LLMSettings(timeout=0.05, backoff=0.001, show_progress=False)
    llm_generator = generator(HangsOnce(), journal, settings=settings)
    assert len(list(llm_generator.generate(some_nodes(1)))) == 2
    assert llm_generator.report.errors == 1


def test_unusable_answers_were_paid_for_and_count_as_attempts_in_later_runs(journal):
    llm = FakeLLM(answers=["I'm sorry, I cannot help with that."])
    settings = LLMSettings(attempts=3, in_flight=1, backoff=0.001, show_progress=False)
    for calls in (4, 6, 6):  # three and one, one and one, and then the LLM is taken to refuse this node
        llm_generator = generator(llm, journal, settings=settings)
        assert list(llm_generator.generate(some_nodes(1))) == []
        assert llm_generator.report.unanswered == ("n0",)
        assert llm.calls == calls


class Random(FakeLLM):
    """An LLM of whose calls a share fails: some of these hold nothing usable, and the others raise."""

    share: float = 0.15
    refusing: float = 0.5
    seed: int = 0
    good: list[str] = []  # noqa: RUF012

    def answer(self, prompt):
        draw = random.Random(f"{self.seed}-{self.calls}").random()
        self.calls += 1
        if draw < self.share * self.refusing:
            return "I'm sorry, but I can't help with that."
        if draw < self.share:
            return ConnectionError("reset by peer")
        self.good.append(prompt)
        return calm_answer(prompt)


@pytest.mark.parametrize("seed", range(3))
def test_with_15_percent_of_calls_failing_all_nodes_are_answered(journal, seed):
    llm = Random(seed=seed)
    llm_generator = generator(llm, journal)
    assert len({query.node_id for query in llm_generator.generate(some_nodes(600))}) == 600
    report = llm_generator.report
    assert (report.answered, report.given_up, report.unanswered) == (600, 0, ())
    assert report.errors + report.unusable > 50
    assert len(llm.good) == len(set(llm.good)) == 600, "no answer was paid for twice"


def test_what_is_given_up_is_named_and_taken_up_by_the_next_run_without_repeating_an_answer(journal):
    nodes, settings = some_nodes(300), LLMSettings(attempts=2, backoff=0.001, max_backoff=0.01, show_progress=False)
    llm, answered, given_up = Random(share=0.6, refusing=0), set(), set()
    while len(answered) < 300:
        llm_generator = generator(llm, journal, settings=settings)
        queries = {query.node_id for query in llm_generator.generate(nodes)}
        report = llm_generator.report
        assert set(report.unanswered) == {node.node_id for node in nodes} - queries
        assert report.given_up == len(report.unanswered)
        assert report.from_journal == len(answered)
        assert queries > answered
        given_up |= set(report.unanswered)
        answered, llm.share, llm.refusing = queries, 0.15, 0.5
    assert len(given_up) > 10, "the LLM would test nothing"
    assert len(llm.good) == len(set(llm.good)) == 300, "no answer was paid for twice"


def test_the_report_of_the_nodes_names_the_ones_that_were_given_up(journal):
    class OneBad(FakeLLM):
        def answer(self, prompt):
            return ConnectionError("down") if "machine number 3 " in prompt else calm_answer(prompt)

    settings = LLMSettings(attempts=2, backoff=0.001, show_progress=False)
    _, report = dataset_from_nodes(some_nodes(6), [generator(OneBad(), journal, settings=settings)])
    assert "1 given up for this run (n3)" in str(report)


def test_one_bad_node_is_skipped_or_ends_the_run(journal):
    class OneBad(FakeLLM):
        def answer(self, prompt):
            return ConnectionError("down") if "machine number 3 " in prompt else calm_answer(prompt)

    settings = {"attempts": 2, "backoff": 0.001, "show_progress": False}
    llm_generator = generator(OneBad(), journal, settings=LLMSettings(**settings))
    assert {q.node_id for q in llm_generator.generate(some_nodes(6))} == {"n0", "n1", "n2", "n4", "n5"}
    assert llm_generator.report.given_up == 1
    with pytest.raises(LLMError, match="ConnectionError: down"):
        list(generator(OneBad(), journal, settings=LLMSettings(**settings, on_failure="fail")).generate(some_nodes(6)))


def test_an_llm_that_never_answers_ends_the_run_early(journal):
    llm = FakeLLM(answers=[PermissionError("wrong key")])
    with pytest.raises(LLMError, match="wrong key"):
        list(
            generator(llm, journal, settings=LLMSettings(attempts=2, in_flight=4, backoff=0.001)).generate(
                some_nodes(200)
            )
        )
    assert llm.calls < 40


def test_nodes_that_were_refused_before_do_not_end_the_next_run(journal):
    class RefusesSome(FakeLLM):
        def answer(self, prompt):
            self.calls += 1
            refused = int(re.search(r"number (\d+) ", prompt)[1]) % 2
            return "I'm sorry, I can't help with that." if refused else calm_answer(prompt)

    llm = RefusesSome()
    settings = LLMSettings(attempts=2, in_flight=4, backoff=0.001, show_progress=False)
    first = list(generator(llm, journal, settings=settings).generate(some_nodes(20)))
    assert len(first) == 20
    assert llm.calls == 10 + 10 * 3, "each of those that were refused once more at the end of the run"
    for calls in (50, 50):  # and once more in the next, but not in every run
        assert list(generator(llm, journal, settings=settings).generate(some_nodes(20))) == first
        assert llm.calls == calls


def test_a_wait_for_the_rate_limiter_is_not_a_timeout(journal):
    class Slow(BaseRateLimiter):
        def acquire(self, num_tokens=0):
            raise NotImplementedError

        async def async_acquire(self, num_tokens=0):
            await asyncio.sleep(0.3)

    class Patient(FakeLLM):
        async def acomplete(self, prompt, formatted=False, **kwargs):
            return CompletionResponse(text=calm_answer(prompt))

    settings = LLMSettings(timeout=0.1, attempts=1, show_progress=False)
    llm_generator = generator(Patient(rate_limiter=Slow()), journal, settings=settings)
    assert len(list(llm_generator.generate(some_nodes(2)))) == 4
    assert llm_generator.report.errors == 0


def test_the_answer_of_a_thread_that_outlives_its_run_is_journalled(journal):
    async def stopped():
        run = asyncio.create_task(generator(Blocking(), journal).agenerate(some_nodes(3)))
        await asyncio.sleep(0.15)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    list(generator(FakeLLM(), f"{journal}.other").generate(some_nodes(1)))  # slow imports are done
    asyncio.run(stopped())
    assert len([r for r in journalled(journal) if r["ok"]]) == 1


def test_stopping_a_notebook_cell_stops_the_requests_and_frees_the_journal(tmp_path, journal):
    code = f"""
import asyncio, os, signal, threading, time
from llama_index_lora_embed.config import LLMSettings
from tests.helpers.llms import FakeLLM, generator, some_nodes
from llama_index_lora_embed.data.llm.journal import Journal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would have inherited as ignored
llm = FakeLLM(latency=0.2)
llm_generator = generator(llm, {journal!r}, settings=LLMSettings(in_flight=1, show_progress=False))
async def cell():
    try:
        list(llm_generator.generate(some_nodes(50)))
    except KeyboardInterrupt:
        calls = llm.calls
        Journal({journal!r}).close()
        time.sleep(0.6)
        print("stopped after", calls, llm.calls)
def press():
    while not llm.calls:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press).start()
loop = asyncio.new_event_loop()
loop.run_until_complete(cell())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said = run.stdout.split()
    assert said[:2] == ["stopped", "after"], run.stderr
    assert said[2] == said[3]
    assert int(said[2]) < 10


def test_a_system_prompt_reaches_llms_of_both_kinds(journal):
    class Chat(FakeLLM):
        @property
        def metadata(self):
            return super().metadata.model_copy(update={"is_chat_model": True})

        async def achat(self, messages, **kwargs):
            self.prompts += [f"{m.role.value}: {m.content}" for m in messages]
            return ChatResponse(message=ChatMessage(content=calm_answer("x")))

    chat, completion = Chat(system_prompt="Be brief."), FakeLLM(system_prompt="Be brief.")
    list(generator(chat, journal).generate(some_nodes(1)))
    assert [prompt.split(":")[0] for prompt in chat.prompts] == ["system", "user"]
    list(generator(completion, f"{journal}.2").generate(some_nodes(1)))
    assert completion.prompts[0].startswith("Be brief.")


def test_with_a_limit_in_tokens_plain_text_is_requested(journal):
    llm = Structured()
    settings = LLMSettings(max_tokens=300, in_flight=1, show_progress=False)
    llm_generator = generator(llm, journal, settings=settings)
    list(llm_generator.generate(some_nodes(10)))
    assert "max_tokens=300" in llm_generator.report.stopped
    with pytest.raises(ConfigError, match="structured"):
        generator(llm, journal, settings=settings, structured=True)


def test_limits_stop_cleanly_and_the_next_run_continues(journal):
    nodes = some_nodes(20)
    llm = FakeLLM()
    llm_generator = generator(llm, journal, settings=LLMSettings(max_requests=7, in_flight=3, show_progress=False))
    assert len(list(llm_generator.generate(nodes))) == 14
    assert llm.calls == 7
    assert "max_requests=7" in str(llm_generator.report)
    llm_generator = generator(llm, journal, settings=LLMSettings(max_tokens=500, in_flight=1, show_progress=False))
    list(llm_generator.generate(nodes))
    assert llm_generator.report.requests == 5  # 107 tokens each
    assert "max_tokens=500" in llm_generator.report.stopped
    assert len(list(generator(llm, journal).generate(nodes))) == 40
    assert llm.calls == 20


def test_a_limit_counts_requests_that_wait_for_the_rate_limiter(journal):
    class Slow(BaseRateLimiter):
        def acquire(self, num_tokens=0):
            raise NotImplementedError

        async def async_acquire(self, num_tokens=0):
            await asyncio.sleep(0.05)

    llm_generator = generator(
        FakeLLM(rate_limiter=Slow()), journal, settings=LLMSettings(max_requests=3, show_progress=False)
    )
    assert len(list(llm_generator.generate(some_nodes(10)))) == 6
    assert llm_generator.report.requests == 3


def test_the_llms_own_rate_limiter_is_honoured(journal):
    class Counting(BaseRateLimiter):
        taken = 0

        def acquire(self, num_tokens=0):
            self.taken += 1

        async def async_acquire(self, num_tokens=0):
            self.taken += 1

    limiter = Counting()
    list(generator(Blocking(rate_limiter=limiter), journal).generate(some_nodes(3)))
    assert limiter.taken == 3


def test_an_llm_without_asynchronous_methods_does_not_block_the_loop(journal):
    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        queries = await generator(Blocking(), journal).agenerate(some_nodes(1))
        ticking.cancel()
        return ticks, queries

    ticks, queries = asyncio.run(main())
    assert ticks > 5
    assert len(queries) == 2


def test_it_runs_inside_a_running_loop_as_in_a_notebook(journal):
    async def cell():
        return list(generator(FakeLLM(), journal).generate(some_nodes(3)))

    assert len(asyncio.run(cell())) == 6


CHAOS = """
import sys
from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.data import LLMQueryGenerator, dataset_from_nodes
from tests.helpers.llms import ChaosLLM, some_nodes
journal, log, out = sys.argv[1:]
settings = LLMSettings(attempts=1000, in_flight=8, backoff=0.001, max_backoff=0.01, timeout=0.2, show_progress=False)
generator = LLMQueryGenerator(llm=ChaosLLM(latency=0.05, log=log), journal=journal, settings=settings)
dataset, _ = dataset_from_nodes(some_nodes(120), [generator])
dataset.save_json(out)
"""


@pytest.mark.slow
def test_chaos_and_ten_kills_end_with_the_dataset_of_a_calm_run(tmp_path, journal):
    log, out = tmp_path / "log", tmp_path / "dataset.json"
    log.touch()
    rng = random.Random(5)
    kills = 0
    while not out.exists():
        known = {r["key"] for r in journalled(journal)} if os.path.exists(journal) else set()
        run = subprocess.Popen([sys.executable, "-c", CHAOS, journal, str(log), str(out)], stderr=subprocess.PIPE)
        if kills < 10:
            while run.poll() is None and not _grown(journal, known):
                time.sleep(0.01)  # until the journal has a new answer
            time.sleep(rng.random() * 0.08)
            run.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), errors.decode()
    assert kills == 10

    calm, _ = dataset_from_nodes(some_nodes(120), [generator(FakeLLM(), f"{journal}.calm")])
    assert json.loads(out.read_text()) == calm.model_dump(exclude_none=True)
    usable = [r["key"] for r in journalled(journal) if r["ok"]]
    assert len(usable) == len(set(usable)) == 120, "a journalled answer was requested again"
    # Only an answer that a kill caught between the LLM and the disk may be paid for again.
    paid = log.read_text().split()
    assert len(paid) - len(set(paid)) <= 10 * 8


def _grown(journal, known):
    if not os.path.exists(journal):
        return False
    with open(journal, "rb") as file:
        return sum(1 for _ in file) - 1 > len(known)
