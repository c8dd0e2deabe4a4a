import asyncio
import json
import os
import pickle
from typing import get_args

import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import ImageNode, TextNode

from llama_index_lora_embed.core.errors import ConfigError, JournalError
from llama_index_lora_embed.data import (
    LLMQueryGenerator,
    MetadataQueryGenerator,
    QueryGenerator,
    dataset_from_nodes,
    drop_unanswered_queries,
)
from llama_index_lora_embed.data.llm.identity import digest
from llama_index_lora_embed.data.questions.llm import _verdict
from llama_index_lora_embed.data.questions.prompts import EXAM_PROMPT, STYLES, Style, search_prompt
from tests.helpers.llms import FAST, FakeLLM, Structured, calm_answer, generator, journalled, some_nodes


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "journal.jsonl")


def test_each_node_gets_two_queries_in_the_order_of_the_nodes(journal):
    nodes = some_nodes()
    llm_generator = generator(FakeLLM(), journal)
    assert isinstance(llm_generator, QueryGenerator)
    queries = list(llm_generator.generate(nodes))
    assert [q.node_id for q in queries] == [node.node_id for node in nodes for _ in range(2)]
    assert {q.generator for q in queries} == {"llm/question", "llm/keywords"}
    assert llm_generator.report.requests == llm_generator.report.answered == 12
    assert (llm_generator.report.prompt_tokens, llm_generator.report.completion_tokens) == (1200, 84)


def test_no_request_is_sent_twice(journal):
    nodes = some_nodes()
    llm = FakeLLM()
    first = list(generator(llm, journal).generate(nodes))
    again = generator(llm, journal)
    assert list(again.generate(nodes)) == first
    assert llm.calls == 12
    assert again.report.from_journal == 12


def test_only_changed_nodes_are_sent_again_in_any_order_of_the_nodes(journal):
    nodes = some_nodes()
    llm = FakeLLM()
    first = list(generator(llm, journal).generate(nodes))
    nodes[3].text = "Chapter 3 was rewritten."
    changed = list(generator(llm, journal).generate([*nodes[:6][::-1], TextNode(text="Chapter 99 is new.", id_="n99")]))
    assert llm.calls == 14
    by_node = {q.node_id for q in changed}
    assert by_node == {"n0", "n1", "n2", "n3", "n4", "n5", "n99"}
    unchanged = [q for q in changed if q.node_id not in ("n3", "n99")]
    assert sorted(unchanged, key=str) == sorted((q for q in first if q.node_id in "n0 n1 n2 n4 n5"), key=str)
    assert changed[0].node_id == "n5"


def test_another_prompt_llm_or_setting_sends_new_requests(journal):
    nodes = some_nodes(2)
    llm = FakeLLM()
    list(generator(llm, journal).generate(nodes))
    list(generator(llm, journal, prompt=EXAM_PROMPT).generate(nodes))
    list(generator(llm, journal, num_queries=3).generate(nodes))
    other = FakeLLM(system_prompt="Be brief.")
    list(generator(other, journal).generate(nodes))
    assert (llm.calls, other.calls) == (6, 2)


def test_many_pipelines_at_once_in_one_loop_take_turns(journal):
    async def all_at_once():
        llm_generator = generator(FakeLLM(latency=0.01), journal)
        pipelines = [IngestionPipeline(transformations=[llm_generator]).arun(nodes=some_nodes(3)) for _ in range(10)]
        return await asyncio.gather(*pipelines)

    for nodes in asyncio.run(all_at_once()):
        assert len(list(MetadataQueryGenerator().generate(nodes))) == 6
    assert len(journalled(journal)) == 3


def test_structured_output_is_used_where_the_llm_has_it(journal):
    queries = list(generator(Structured(), journal).generate(some_nodes(2)))
    assert [(q.text, q.generator) for q in queries] == [("machine cleaning", "llm/keywords")] * 2
    assert json.loads(journalled(journal)[0]["answer"])["queries"]


def test_plain_lines_are_requested_if_structured_output_keeps_failing(journal):
    queries = list(generator(Structured(broken=True), journal).generate(some_nodes(1)))
    assert len(queries) == 2


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
def test_the_prompt_is_in_the_language_of_the_node(journal, text, word):
    llm = FakeLLM()
    list(generator(llm, journal).generate([TextNode(text=text)]))
    assert word in llm.prompts[0]
    assert text in llm.prompts[0]


def test_all_styles_are_used_in_turn(journal):
    llm = FakeLLM()
    list(generator(llm, journal, num_queries=2).generate(some_nodes(40)))
    for style in ("question", "keywords", "paraphrase", "conversational"):
        assert 5 < sum(f"- {style}:" in prompt for prompt in llm.prompts) < 35


def test_claims_and_titles_are_written_where_asked_for(journal):
    llm = FakeLLM(answers=["claim: Machines are cleaned every evening.\n**Title:** Cleaning of machines"])
    queries = list(generator(llm, journal, styles=("claim", "title")).generate(some_nodes(1)))
    assert {(q.text, q.generator) for q in queries} == {
        ("Machines are cleaned every evening.", "llm/claim"),
        ("Cleaning of machines", "llm/title"),
    }
    assert all(f"- {style}: " in llm.prompts[0] for style in ("claim", "title"))


@pytest.mark.parametrize("language", ["en", "de", "fr", "es", "zh"])
def test_every_style_is_described_in_every_language(language):
    styles = get_args(Style)
    prompt = search_prompt(styles, len(styles), language).format(context_str="", num_questions_per_chunk=6)
    assert all(prompt.count(f"{style}: ") == 2 for style in styles), "described, and shown in the example"


def test_the_default_prompts_are_those_of_existing_journals():
    """A prompt of other words would send every node of every journal again."""
    prompts = [
        search_prompt(STYLES, 2, language).format(context_str="text", num_questions_per_chunk=2)
        for language in ("en", "de", "fr", "es", "zh", None, "ru")
    ]
    assert digest("\n".join(prompts)) == "0e962d668e632fd6804e76e7cea5da89"


def test_a_custom_prompt_is_used_as_it_is(journal):
    llm = FakeLLM()
    template = PromptTemplate("Ask {num_questions_per_chunk} about {context_str} for {whom}", whom="nurses")
    list(generator(llm, journal, prompt=template).generate([TextNode(text="a {text} with {braces}")]))
    assert llm.prompts == ["Ask 2 about a {text} with {braces} for nurses"]


def test_unusual_nodes_get_queries_or_are_skipped(journal):
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
    queries = list(generator(llm, journal).generate(nodes))
    assert {q.node_id for q in queries} == {"megabyte", "mixed", "control", "twice", "surrogate"}
    assert max(map(len, llm.prompts)) < 4096 * 3
    assert not any(ord(c) < 32 and c not in "\n\t" for prompt in llm.prompts for c in prompt)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"llm": "gpt-4"}, "llm: expected a LlamaIndex LLM, got 'gpt-4'"),
        ({"styles": ("question", "rhymes")}, "rhymes"),
        ({"prompt": "Ask me anything"}, "context_str"),
        ({"settings": {"attempts": 0, "timeout": -1}}, "timeout=-1"),
        ({"settings": {"attempts": 0}}, "attempts=0"),
        ({"styles": ()}, "styles"),
        ({"styles": "question"}, "styles"),
        ({"num_queries": 0}, "num_queries=0: expected a whole number"),
        ({"num_query": 7}, "num_query: unknown; did you mean 'num_queries'"),
        ({"journal": None}, "journal"),
        ({"journal": ""}, "journal=''"),
    ],
)
def test_wrong_arguments_are_named_before_any_request(journal, wrong, problem):
    with pytest.raises(ConfigError, match=problem):
        LLMQueryGenerator(**{"llm": FakeLLM(), "journal": journal, **wrong})
    assert not os.path.exists(journal)


def test_a_new_journal_stays_in_the_folder_in_which_the_generator_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llm_generator = generator(FakeLLM(), "journal.jsonl")
    monkeypatch.chdir("/")
    assert llm_generator.journal == str(tmp_path / "journal.jsonl")


def test_a_journal_of_another_version_is_refused_before_any_request(journal):
    with open(journal, "w") as file:
        file.write('{"format": "llama-index-lora-embed journal", "version": 9}\n')
    llm = FakeLLM()
    with pytest.raises(JournalError, match="version 9"):
        list(generator(llm, journal).generate(some_nodes(2)))
    assert llm.calls == 0


def test_queries_of_an_ingestion_pipeline_are_read_from_the_metadata(journal):
    llm = FakeLLM()
    nodes = IngestionPipeline(transformations=[generator(llm, journal)]).run(nodes=some_nodes(3))
    queries = list(MetadataQueryGenerator().generate(nodes))
    assert len(queries) == 6
    assert {q.generator for q in queries} == {"llm/question", "llm/keywords"}
    assert nodes[0].get_content("embed") == some_nodes(1)[0].get_content("embed")
    arun = asyncio.run(IngestionPipeline(transformations=[generator(llm, journal)]).arun(nodes=some_nodes(3)))
    assert [q.text for q in MetadataQueryGenerator().generate(arun)] == [q.text for q in queries]
    assert llm.calls == 3


@pytest.mark.slow
def test_worker_processes_of_a_pipeline_take_turns_with_the_journal(journal):
    nodes = IngestionPipeline(transformations=[generator(FakeLLM(), journal)]).run(nodes=some_nodes(6), num_workers=2)
    assert len(list(MetadataQueryGenerator().generate(nodes))) == 12
    assert len(journalled(journal)) == 6


def test_a_generator_can_be_pickled_and_its_dict_distinguishes_settings(journal):
    llm_generator = generator(FakeLLM(), journal)
    assert pickle.loads(pickle.dumps(llm_generator)).to_dict() == llm_generator.to_dict()
    assert generator(FakeLLM(), journal, num_queries=3).to_dict() != llm_generator.to_dict()


def test_a_judge_drops_queries_that_their_passage_does_not_answer(journal):
    class Judge(FakeLLM):
        def answer(self, prompt):
            if "Does the text answer the query?" not in prompt:
                return calm_answer(prompt)
            self.calls += 1
            return "No." if "machine number 2 " in prompt else "Yes, it does."

    llm = Judge()
    dataset, _ = dataset_from_nodes(some_nodes(4), [generator(llm, journal)])
    for _ in range(2):
        judged, report, dropped = drop_unanswered_queries(dataset, llm, journal=journal, settings=FAST)
        assert len(dropped) == 2
        assert {judged.relevant_docs[i][0] for i in judged.queries} == {"n0", "n1", "n3"}
        assert judged.corpus == dataset.corpus
    assert llm.calls == 8
    assert report.from_journal == 8
    _, report, dropped = drop_unanswered_queries(dataset, llm, origins="llm/question", journal=journal, settings=FAST)
    assert (report.from_journal, len(dropped)) == (4, 1)
    with pytest.raises(ConfigError, match="expected a LlamaIndex LLM"):
        drop_unanswered_queries(dataset, "gpt-4", journal=journal)


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
def test_a_verdict_is_parsed_or_none(answer, verdict):
    assert _verdict(answer) is verdict
