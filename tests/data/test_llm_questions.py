import asyncio
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.prompts import PromptTemplate
from llama_index.core.rate_limiter import BaseRateLimiter
from llama_index.core.schema import ImageNode, TextNode

from llama_index_lora_embed import QuestionMaker
from llama_index_lora_embed.config import AskingSettings
from llama_index_lora_embed.data import CarriedQuestionsMaker, LLMQuestionMaker, dataset_from_nodes, judge_questions
from llama_index_lora_embed.data.journal import Journal
from llama_index_lora_embed.data.llm_facts import llm_identity
from llama_index_lora_embed.data.llm_questions import _verdict
from llama_index_lora_embed.data.prompts import EXAM_PROMPT
from llama_index_lora_embed.errors import ConfigError, JournalError, LLMError
from tests.data.llms import FakeLLM, calm_answer

FAST = AskingSettings(backoff=0.001, max_backoff=0.01, timeout=5, show_progress=False)


def some_nodes(count=12, start=0):
    return [
        TextNode(text=f"Chapter {i} of the handbook says how the machine number {i} is cleaned.", id_=f"n{i}")
        for i in range(start, start + count)
    ]


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "journal.jsonl")


def maker(llm, journal, **kwargs):
    return LLMQuestionMaker(llm=llm, journal=journal, **{"settings": FAST, **kwargs})


def test_two_questions_a_node_in_the_order_of_the_nodes(journal):
    nodes = some_nodes()
    made = maker(FakeLLM(), journal)
    assert isinstance(made, QuestionMaker)
    questions = list(made.make(nodes))
    assert [q.node_id for q in questions] == [node.node_id for node in nodes for _ in range(2)]
    assert {q.maker for q in questions} == {"llm/question", "llm/keywords"}
    assert made.report.requests == made.report.answered == 12
    assert (made.report.prompt_tokens, made.report.completion_tokens) == (1200, 84)


def test_no_more_requests_are_under_way_than_allowed(journal):
    llm = FakeLLM(latency=0.02)
    list(maker(llm, journal, settings=AskingSettings(in_flight=5, show_progress=False)).make(some_nodes(20)))
    assert llm.most_at_once == 5


def test_nothing_is_asked_twice(journal):
    nodes = some_nodes()
    llm = FakeLLM()
    first = list(maker(llm, journal).make(nodes))
    again = maker(llm, journal)
    assert list(again.make(nodes)) == first
    assert llm.calls == 12
    assert again.report.from_journal == 12


def test_changed_nodes_are_asked_anew_removed_ones_dropped_and_order_does_not_matter(journal):
    nodes = some_nodes()
    llm = FakeLLM()
    first = list(maker(llm, journal).make(nodes))
    nodes[3].text = "Chapter 3 was rewritten."
    changed = list(maker(llm, journal).make([*nodes[:6][::-1], TextNode(text="Chapter 99 is new.", id_="n99")]))
    assert llm.calls == 14
    by_node = {q.node_id for q in changed}
    assert by_node == {"n0", "n1", "n2", "n3", "n4", "n5", "n99"}
    unchanged = [q for q in changed if q.node_id not in ("n3", "n99")]
    assert sorted(unchanged, key=str) == sorted((q for q in first if q.node_id in "n0 n1 n2 n4 n5"), key=str)
    assert changed[0].node_id == "n5"


def test_another_prompt_llm_or_setting_asks_again(journal):
    nodes = some_nodes(2)
    llm = FakeLLM()
    list(maker(llm, journal).make(nodes))
    list(maker(llm, journal, prompt=EXAM_PROMPT).make(nodes))
    list(maker(llm, journal, num_questions=3).make(nodes))
    other = FakeLLM(system_prompt="Be brief.")
    list(maker(other, journal).make(nodes))
    assert (llm.calls, other.calls) == (6, 2)


def test_an_llms_identity_holds_no_key_and_no_address():
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


def test_the_same_text_twice_is_asked_about_once(journal):
    llm = FakeLLM(latency=0.01)
    nodes = [TextNode(text="The same text in two nodes.", id_=f"n{i}") for i in range(2)]
    questions = list(maker(llm, journal).make(nodes))
    assert llm.calls == 1
    assert len(questions) == 4


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
def test_a_bad_answer_is_asked_for_again(journal, bad):
    llm = FakeLLM(answers=[bad, "What is cleaned?"])
    made = maker(llm, journal, settings=AskingSettings(in_flight=1, backoff=0.001, show_progress=False))
    (question,) = made.make(some_nodes(1))
    assert question.text == "What is cleaned?"
    assert llm.calls == 2
    assert made.report.refused + made.report.errors == 1


def test_a_hanging_call_times_out_and_is_repeated(journal):
    class HangsOnce(FakeLLM):
        async def acomplete(self, prompt, formatted=False, **kwargs):
            self.calls += 1
            if self.calls == 1:
                await asyncio.sleep(60)
            return CompletionResponse(text=calm_answer(prompt))

    made = maker(HangsOnce(), journal, settings=AskingSettings(timeout=0.05, backoff=0.001, show_progress=False))
    assert len(list(made.make(some_nodes(1)))) == 2
    assert made.report.errors == 1


def test_unusable_answers_were_paid_for_and_count_as_attempts_in_later_runs(journal):
    llm = FakeLLM(answers=["I'm sorry, I cannot help with that."])
    settings = AskingSettings(attempts=3, in_flight=1, backoff=0.001, show_progress=False)
    for _ in range(2):
        made = maker(llm, journal, settings=settings)
        assert list(made.make(some_nodes(1))) == []
        assert made.report.given_up == 1
    assert llm.calls == 3


def test_one_bad_node_is_left_out_or_ends_the_run(journal):
    class OneBad(FakeLLM):
        def answer(self, prompt):
            return ConnectionError("down") if "machine number 3 " in prompt else calm_answer(prompt)

    settings = {"attempts": 2, "backoff": 0.001, "show_progress": False}
    made = maker(OneBad(), journal, settings=AskingSettings(**settings))
    assert {q.node_id for q in made.make(some_nodes(6))} == {"n0", "n1", "n2", "n4", "n5"}
    assert made.report.given_up == 1
    with pytest.raises(LLMError, match="ConnectionError: down"):
        list(maker(OneBad(), journal, settings=AskingSettings(**settings, on_failure="fail")).make(some_nodes(6)))


def test_an_llm_that_never_answers_is_not_asked_about_the_whole_corpus(journal):
    llm = FakeLLM(answers=[PermissionError("wrong key")])
    with pytest.raises(LLMError, match="wrong key"):
        list(maker(llm, journal, settings=AskingSettings(attempts=2, in_flight=4, backoff=0.001)).make(some_nodes(200)))
    assert llm.calls < 40


def test_nodes_that_were_refused_before_do_not_end_the_next_run(journal):
    class RefusesSome(FakeLLM):
        def answer(self, prompt):
            self.calls += 1
            refused = int(re.search(r"number (\d+) ", prompt)[1]) % 2
            return "I'm sorry, I can't help with that." if refused else calm_answer(prompt)

    llm = RefusesSome()
    settings = AskingSettings(attempts=2, in_flight=4, backoff=0.001, show_progress=False)
    first = list(maker(llm, journal, settings=settings).make(some_nodes(20)))
    assert len(first) == 20
    calls = llm.calls
    assert list(maker(llm, journal, settings=settings).make(some_nodes(20))) == first
    assert llm.calls == calls


def test_a_wait_for_the_rate_limiter_is_no_timeout(journal):
    class Slow(BaseRateLimiter):
        def acquire(self, num_tokens=0):
            raise NotImplementedError

        async def async_acquire(self, num_tokens=0):
            await asyncio.sleep(0.3)

    class Patient(FakeLLM):
        async def acomplete(self, prompt, formatted=False, **kwargs):
            return CompletionResponse(text=calm_answer(prompt))

    settings = AskingSettings(timeout=0.1, attempts=1, show_progress=False)
    made = maker(Patient(rate_limiter=Slow()), journal, settings=settings)
    assert len(list(made.make(some_nodes(2)))) == 4
    assert made.report.errors == 0


def test_a_thread_that_outlives_its_run_brings_its_answer_home(journal):
    async def stopped():
        asking = asyncio.create_task(maker(Blocking(), journal).amake(some_nodes(3)))
        await asyncio.sleep(0.15)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    list(maker(FakeLLM(), f"{journal}.other").make(some_nodes(1)))  # what loads slowly is loaded
    asyncio.run(stopped())
    assert len([r for r in Journal(journal) if r["ok"]]) == 1


def test_stopping_a_notebooks_cell_stops_the_asking_and_frees_the_journal(tmp_path, journal):
    code = f"""
import asyncio, os, signal, threading, time
from tests.data.test_llm_questions import FakeLLM, maker, some_nodes, AskingSettings
from llama_index_lora_embed.data.journal import Journal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would have inherited as ignored
llm = FakeLLM(latency=0.2)
made = maker(llm, {journal!r}, settings=AskingSettings(in_flight=1, show_progress=False))
async def cell():
    try:
        list(made.make(some_nodes(50)))
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


def test_many_pipelines_at_once_in_one_loop_take_turns(journal):
    async def all_at_once():
        made = maker(FakeLLM(latency=0.01), journal)
        pipelines = [IngestionPipeline(transformations=[made]).arun(nodes=some_nodes(3)) for _ in range(10)]
        return await asyncio.gather(*pipelines)

    for nodes in asyncio.run(all_at_once()):
        assert len(list(CarriedQuestionsMaker().make(nodes))) == 6
    assert len(list(Journal(journal))) == 3


def test_a_system_prompt_reaches_llms_of_both_kinds(journal):
    class Chat(FakeLLM):
        @property
        def metadata(self):
            return super().metadata.model_copy(update={"is_chat_model": True})

        async def achat(self, messages, **kwargs):
            self.prompts += [f"{m.role.value}: {m.content}" for m in messages]
            return ChatResponse(message=ChatMessage(content=calm_answer("x")))

    chat, completion = Chat(system_prompt="Be brief."), FakeLLM(system_prompt="Be brief.")
    list(maker(chat, journal).make(some_nodes(1)))
    assert [prompt.split(":")[0] for prompt in chat.prompts] == ["system", "user"]
    list(maker(completion, f"{journal}.2").make(some_nodes(1)))
    assert completion.prompts[0].startswith("Be brief.")


def test_with_a_bound_in_tokens_plain_text_is_asked_for(journal):
    llm = Structured()
    settings = AskingSettings(max_tokens=300, in_flight=1, show_progress=False)
    made = maker(llm, journal, settings=settings)
    list(made.make(some_nodes(10)))
    assert "max_tokens=300" in made.report.stopped
    with pytest.raises(ConfigError, match="structured"):
        maker(llm, journal, settings=settings, structured=True)


def test_bounds_stop_cleanly_and_the_next_run_goes_on(journal):
    nodes = some_nodes(20)
    llm = FakeLLM()
    made = maker(llm, journal, settings=AskingSettings(max_requests=7, in_flight=3, show_progress=False))
    assert len(list(made.make(nodes))) == 14
    assert llm.calls == 7
    assert "max_requests=7" in str(made.report)
    made = maker(llm, journal, settings=AskingSettings(max_tokens=500, in_flight=1, show_progress=False))
    list(made.make(nodes))
    assert made.report.requests == 5  # 107 tokens each
    assert "max_tokens=500" in made.report.stopped
    assert len(list(maker(llm, journal).make(nodes))) == 40
    assert llm.calls == 20


class Blocking(CustomLLM):
    """One of those that have no asynchronous methods of their own."""

    @property
    def metadata(self):
        return LLMMetadata(model_name="blocking")

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **kwargs):
        time.sleep(0.3)
        return CompletionResponse(text=calm_answer(prompt))

    def stream_complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError


def test_the_llms_own_rate_limiter_is_honoured(journal):
    class Counting(BaseRateLimiter):
        taken = 0

        def acquire(self, num_tokens=0):
            self.taken += 1

        async def async_acquire(self, num_tokens=0):
            self.taken += 1

    limiter = Counting()
    list(maker(Blocking(rate_limiter=limiter), journal).make(some_nodes(3)))
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
        questions = await maker(Blocking(), journal).amake(some_nodes(1))
        ticking.cancel()
        return ticks, questions

    ticks, questions = asyncio.run(main())
    assert ticks > 5
    assert len(questions) == 2


def test_it_runs_inside_a_running_loop_as_in_a_notebook(journal):
    async def cell():
        return list(maker(FakeLLM(), journal).make(some_nodes(3)))

    assert len(asyncio.run(cell())) == 6


class Structured(FakeLLM):
    """Calls functions: answers with the pydantic class it is asked for, or fails at it."""

    broken: bool = False

    @property
    def metadata(self):
        return super().metadata.model_copy(update={"is_function_calling_model": True})

    async def astructured_predict(self, output_cls, prompt, llm_kwargs=None, **prompt_args):
        self.calls += 1
        if self.broken:
            raise ValueError("no tool call")
        return output_cls(queries=[{"style": "keywords", "query": "machine cleaning"}])


def test_structured_output_is_used_where_the_llm_has_it(journal):
    questions = list(maker(Structured(), journal).make(some_nodes(2)))
    assert [(q.text, q.maker) for q in questions] == [("machine cleaning", "llm/keywords")] * 2
    assert json.loads(next(iter(Journal(journal)))["answer"])["queries"]


def test_plain_lines_are_asked_for_where_structured_output_keeps_failing(journal):
    questions = list(maker(Structured(broken=True), journal).make(some_nodes(1)))
    assert len(questions) == 2


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (
            "Die Maschine wird jeden Abend gereinigt, und zwar bevor die letzte Schicht das Haus verlässt.",
            "Suchanfragen",
        ),
        ("La machine est nettoyée chaque soir avant que la dernière équipe ne quitte la maison.", "requêtes"),
        ("La máquina se limpia todas las noches antes de que el último turno abandone el edificio.", "búsquedas"),
        ("机器每天晚上在最后一班离开之前都要清洗干净。", "搜索查询"),
        ("The machine is cleaned every evening before the last shift leaves the building.", "search queries"),
        ("Машину чистят каждый вечер перед тем, как последняя смена покидает здание.", "in the language of the text"),
    ],
)
def test_a_node_is_asked_about_in_its_own_language(journal, text, word):
    llm = FakeLLM()
    list(maker(llm, journal).make([TextNode(text=text)]))
    assert word in llm.prompts[0]
    assert text in llm.prompts[0]


def test_all_styles_come_round(journal):
    llm = FakeLLM()
    list(maker(llm, journal, num_questions=2).make(some_nodes(40)))
    for style in ("question", "keywords", "paraphrase", "conversational"):
        assert 5 < sum(f"- {style}:" in prompt for prompt in llm.prompts) < 35


def test_a_prompt_of_ones_own_is_used_as_it_is(journal):
    llm = FakeLLM()
    template = PromptTemplate("Ask {num_questions_per_chunk} about {context_str} for {whom}", whom="nurses")
    list(maker(llm, journal, prompt=template).make([TextNode(text="a {text} with {braces}")]))
    assert llm.prompts == ["Ask 2 about a {text} with {braces} for nurses"]


def test_odd_nodes_are_asked_about_or_passed_over_never_a_crash(journal):
    llm = FakeLLM()
    nodes = [
        ImageNode(image="aGVsbG8=", id_="image"),
        TextNode(text="", id_="empty"),
        TextNode(text=" \n\t ", id_="blank"),
        TextNode(text="x y " * 250_000, id_="megabyte"),
        TextNode(text="日本語とрусский and 🚀 emoji عربى", id_="mixed"),
        TextNode(text="bell \x07 and null \x00 and escape \x1b", id_="control"),
        TextNode(text="a lone surrogate \ud800 in it", id_="surrogate"),
        TextNode(text="first text", id_="twice"),
        TextNode(text="second text", id_="twice"),
    ]
    questions = list(maker(llm, journal).make(nodes))
    assert {q.node_id for q in questions} == {"megabyte", "mixed", "control", "twice", "surrogate"}
    assert max(map(len, llm.prompts)) < 4096 * 3
    assert not any(ord(c) < 32 and c not in "\n\t" for prompt in llm.prompts for c in prompt)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"llm": "gpt-4"}, "llm='gpt-4'"),
        ({"styles": ("question", "rhymes")}, "rhymes"),
        ({"prompt": "Ask me anything"}, "context_str"),
        ({"settings": AskingSettings(attempts=0, timeout=-1)}, "attempts=0"),
        ({"settings": {"attempts": 0}}, "attempts=0"),
        ({"styles": ()}, "styles"),
        ({"styles": "question"}, "styles"),
        ({"num_questions": 0}, "num_questions"),
        ({"num_question": 7}, "num_question: no such argument"),
        ({"journal": None}, "journal"),
    ],
)
def test_wrong_arguments_are_all_named_before_anything_is_asked(journal, wrong, told):
    with pytest.raises(ConfigError, match=told):
        LLMQuestionMaker(**{"llm": FakeLLM(), "journal": journal, **wrong})
    assert not os.path.exists(journal)


def test_a_journal_of_another_version_stops_before_the_llm_is_asked(journal):
    with open(journal, "w") as file:
        file.write('{"format": "llama-index-lora-embed journal", "version": 9}\n')
    llm = FakeLLM()
    with pytest.raises(JournalError, match="version 9"):
        list(maker(llm, journal).make(some_nodes(2)))
    assert llm.calls == 0


def test_it_works_in_an_ingestion_pipeline_and_its_questions_come_out_again(journal):
    llm = FakeLLM()
    nodes = IngestionPipeline(transformations=[maker(llm, journal)]).run(nodes=some_nodes(3))
    questions = list(CarriedQuestionsMaker().make(nodes))
    assert len(questions) == 6
    assert {q.maker for q in questions} == {"llm/question", "llm/keywords"}
    assert nodes[0].get_content("embed") == some_nodes(1)[0].get_content("embed")
    arun = asyncio.run(IngestionPipeline(transformations=[maker(llm, journal)]).arun(nodes=some_nodes(3)))
    assert [q.text for q in CarriedQuestionsMaker().make(arun)] == [q.text for q in questions]
    assert llm.calls == 3


def test_worker_processes_of_a_pipeline_take_turns_at_the_journal(journal):
    nodes = IngestionPipeline(transformations=[maker(FakeLLM(), journal)]).run(nodes=some_nodes(6), num_workers=2)
    assert len(list(CarriedQuestionsMaker().make(nodes))) == 12
    assert len(list(Journal(journal))) == 6


def test_it_pickles_and_its_dict_tells_settings_apart(journal):
    made = maker(FakeLLM(), journal)
    assert pickle.loads(pickle.dumps(made)).to_dict() == made.to_dict()
    assert maker(FakeLLM(), journal, num_questions=3).to_dict() != made.to_dict()


def test_a_judge_drops_questions_that_their_passage_does_not_answer(journal):
    class Judge(FakeLLM):
        def answer(self, prompt):
            if "Does the text answer the query?" not in prompt:
                return calm_answer(prompt)
            self.calls += 1
            return "No." if "machine number 2 " in prompt else "Yes, it does."

    llm = Judge()
    dataset, _ = dataset_from_nodes(some_nodes(4), [maker(llm, journal)])
    for _ in range(2):
        judged, report, dropped = judge_questions(dataset, llm, journal=journal, settings=FAST)
        assert len(dropped) == 2
        assert {judged.relevant_docs[i][0] for i in judged.queries} == {"n0", "n1", "n3"}
        assert judged.corpus == dataset.corpus
    assert llm.calls == 8
    assert report.from_journal == 8


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Yes", True),
        ("no.", False),
        ("**Yes**, it does, no doubt", True),
        ("<think>No obvious mismatch. The text covers it.</think>\nYes", True),
        ("The answer is no", False),
        ("Yes/No: No", None),
        ("There is no doubt: yes.", None),
        ("I cannot answer yes or no.", None),
        ("maybe", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_left_open(answer, verdict):
    assert _verdict(answer) is verdict


CHAOS = """
import sys
from llama_index_lora_embed.config import AskingSettings
from llama_index_lora_embed.data import LLMQuestionMaker, dataset_from_nodes
from tests.data.llms import ChaosLLM
from tests.data.test_llm_questions import some_nodes
journal, log, out = sys.argv[1:]
settings = AskingSettings(attempts=1000, in_flight=8, backoff=0.001, max_backoff=0.01, timeout=0.2, show_progress=False)
maker = LLMQuestionMaker(llm=ChaosLLM(latency=0.05, log=log), journal=journal, settings=settings)
dataset, _ = dataset_from_nodes(some_nodes(120), [maker])
dataset.save_json(out)
"""


def test_chaos_and_ten_kills_end_with_the_dataset_of_a_calm_run(tmp_path, journal):
    log, out = tmp_path / "log", tmp_path / "dataset.json"
    log.touch()
    rng = random.Random(5)
    kills = 0
    while not out.exists():
        known = {r["key"] for r in Journal(journal)} if os.path.exists(journal) else set()
        run = subprocess.Popen([sys.executable, "-c", CHAOS, journal, str(log), str(out)], stderr=subprocess.PIPE)
        if kills < 10:
            while run.poll() is None and not _grown(journal, known):
                time.sleep(0.01)  # until it has asked something
            time.sleep(rng.random() * 0.08)
            run.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), errors.decode()
    assert kills == 10

    calm, _ = dataset_from_nodes(some_nodes(120), [maker(FakeLLM(), f"{journal}.calm")])
    assert json.loads(out.read_text()) == calm.model_dump(exclude_none=True)
    usable = [r["key"] for r in Journal(journal) if r["ok"]]
    assert len(usable) == len(set(usable)) == 120, "a journalled answer was asked for again"
    # An answer on its way between the LLM and the disk when the kill came may be paid for again, no other.
    asked = log.read_text().split()
    assert len(asked) - len(set(asked)) <= 10 * 8


def _grown(journal, known):
    if not os.path.exists(journal):
        return False
    with open(journal, "rb") as file:
        return sum(1 for _ in file) - 1 > len(known)
