"""The demo's recorded queries: replayed by the real generator, without an LLM."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.data import dataset_from_nodes

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports a script of the examples by name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.slow
def test_the_journal_gives_queries_for_its_topics_without_a_call(example, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # the demo may import its neighbours
    recorded, demo = example("recorded_llm"), example("demo")
    committed = recorded.JOURNAL.read_bytes()
    nodes = demo.chunk(demo.python_reference())
    generator = recorded.recorded_query_generator(tmp_path)
    dataset, report = dataset_from_nodes(nodes, [generator], filters=QueryFilterSettings(round_trip_k=None))

    assert generator.report.requests == generator.report.given_up == 0
    # 950 to 1,150 on Python 3.10 to 3.13, whose texts differ
    assert len(dataset.queries) >= 900
    assert report.filtered.kept >= 0.99 * report.filtered.given
    topics = {node.node_id: node.metadata["topic"] for node in nodes}
    answered = {topics[node_id] for node_ids in dataset.relevant_docs.values() for node_id in node_ids}
    assert all(map(recorded.has_queries, answered))
    assert not all(map(recorded.has_queries, topics.values()))
    assert recorded.JOURNAL.read_bytes() == committed


@pytest.mark.slow
def test_the_demo_searches_with_base_and_tuned_in_the_same_way(example, monkeypatch, tmp_path, minilm, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    demo = example("demo")
    nodes = demo.chunk(demo.python_reference())[:80]
    index = demo.build_index(nodes, LoraEmbedding(base_model=minilm), tmp_path, "base")
    demo.print_test_half(nodes, index, index, ["llm"])
    printed = capsys.readouterr().out
    figures = {name: re.findall(rf"\) +{name} +(0.*)", printed) for name in ("base", "tuned")}
    assert len(figures["base"]) == 3
    assert figures["base"] == figures["tuned"]


def shingles(query):
    text = " ".join(re.findall(r"\w+", query.lower()))
    return {text[i : i + 3] for i in range(len(text) - 2)}


def test_no_recorded_query_is_a_near_copy_of_a_test_question(example):
    questions = [shingles(item["query"]) for item in json.loads((EXAMPLES / "python_queries.json").read_text())]
    assert len(questions) >= 200
    lines = [json.loads(line) for line in example("recorded_llm").JOURNAL.read_text(encoding="utf-8").splitlines()]
    queries = {line.partition(": ")[2] for entry in lines for line in entry.get("answer", "").splitlines()}
    assert len(queries) >= 900
    recorded = {query: shingles(query) for query in queries}
    assert [q for q, s in recorded.items() if any(len(s & u) > 0.5 * len(s | u) for u in questions)] == []


def test_a_node_without_a_recorded_answer_gets_no_query(example, tmp_path):
    generator = example("recorded_llm").recorded_query_generator(tmp_path)
    assert list(generator.generate([TextNode(text="A text that nobody has written a query for.")])) == []
    assert generator.report.requests == 0
