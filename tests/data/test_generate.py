import asyncio
import inspect
import json

import pytest
from llama_index.core.schema import TextNode

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.core.errors import ConfigError, LLMError
from llama_index_lora_embed.data import agenerate_qa_embedding_pairs, generate_qa_embedding_pairs
from tests.helpers.llms import FakeLLM, calm_answer, some_nodes


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "dataset.json")


def generate(nodes, llm, output, **kwargs):
    return generate_qa_embedding_pairs(nodes, llm, output_path=output, verbose=False, **kwargs)


def test_the_signature_is_the_old_ones():
    old = pytest.importorskip("llama_index.finetuning").generate_qa_embedding_pairs
    for ours in (generate_qa_embedding_pairs, agenerate_qa_embedding_pairs):
        theirs, mine = inspect.signature(old).parameters, inspect.signature(ours).parameters
        assert list(mine) == list(theirs)
        for name in theirs:
            assert mine[name].kind == theirs[name].kind
            if name != "qa_generate_prompt_tmpl":  # another prompt
                assert mine[name].default == theirs[name].default


def test_it_returns_and_writes_a_dataset(output):
    dataset = generate(some_nodes(5), FakeLLM(), output)
    assert isinstance(dataset, EmbeddingQAFinetuneDataset)
    assert (len(dataset.queries), len(dataset.corpus)) == (10, 5)
    assert EmbeddingQAFinetuneDataset.from_json(output) == dataset.check()
    assert dataset.corpus["n0"] == some_nodes(1)[0].get_content()


def test_the_old_package_reads_what_was_written(output):
    old = pytest.importorskip("llama_index.finetuning").EmbeddingQAFinetuneDataset
    dataset = generate(some_nodes(3), FakeLLM(), output)
    assert old.from_json(output).queries == dataset.queries


def test_the_asynchronous_twin_gives_the_same(output, tmp_path):
    twin = asyncio.run(
        agenerate_qa_embedding_pairs(
            some_nodes(5), FakeLLM(), output_path=str(tmp_path / "twin.json"), verbose=False, save_every=2
        )
    )
    assert twin == generate(some_nodes(5), FakeLLM(), output)


def test_a_second_call_sends_no_requests(output):
    llm = FakeLLM()
    first = generate(some_nodes(5), llm, output, save_every=2)
    assert generate(some_nodes(5), llm, output) == first
    assert llm.calls == 5


def test_a_skipped_node_does_not_shift_the_others(output):
    class OneBad(FakeLLM):
        def answer(self, prompt):
            return ConnectionError("down") if "number 1 " in prompt else calm_answer(prompt)

    partial = generate(some_nodes(4), OneBad(), output, retry_limit=1)
    assert {d for docs in partial.relevant_docs.values() for d in docs} == {"n0", "n2", "n3"}
    llm = FakeLLM()
    whole = generate(some_nodes(4), llm, output)
    assert llm.calls == 1
    assert len(whole.queries) == 8


def test_the_dataset_so_far_is_on_disk_when_a_later_chunk_fails(output):
    class DiesLate(FakeLLM):
        def answer(self, prompt):
            return ConnectionError("down") if "number 9 " in prompt else calm_answer(prompt)

    with pytest.raises(LLMError):
        generate(some_nodes(10), DiesLate(), output, on_failure="fail", retry_limit=1, save_every=4)
    assert len(EmbeddingQAFinetuneDataset.from_json(output).corpus) == 8


def test_two_corpora_with_one_output_path_are_both_kept(output):
    train = generate(some_nodes(3), FakeLLM(), output)
    val = generate(some_nodes(3, start=50), FakeLLM(), output)
    assert not val.corpus.keys() & train.corpus.keys()
    assert EmbeddingQAFinetuneDataset.from_json(output) == val
    assert EmbeddingQAFinetuneDataset.from_json(f"{output}.previous") == train


def test_an_unfinished_file_of_the_old_package_is_continued(output):
    nodes = some_nodes(4)
    nodes[1].text = "Rewritten since."
    old = {
        "queries": {"a": "Old question zero?", "b": "Old question one?"},
        "corpus": {node.node_id: node.text for node in some_nodes(2)},
        "relevant_docs": {"a": ["n0"], "b": ["n1"]},
        "mode": "text",
    }
    with open(output, "w") as file:
        json.dump(old, file)
    llm = FakeLLM()
    dataset = generate(nodes, llm, output)
    assert llm.calls == 3
    assert "Old question zero?" in dataset.queries.values()
    assert "Old question one?" not in dataset.queries.values()
    assert generate(nodes, llm, output) == dataset
    assert llm.calls == 3, "its answers are in no journal, so the old file must be kept"


def test_a_custom_prompt_in_the_old_form_is_used(output):
    llm = FakeLLM()
    generate(
        [TextNode(text="some text")], llm, output, qa_generate_prompt_tmpl="{num_questions_per_chunk}: {context_str}"
    )
    assert llm.prompts == ["2: some text"]


@pytest.mark.parametrize(
    "wrong",
    [{"save_every": 0}, {"retry_limit": 0}, {"on_failure": "shrug"}, {"llm": None}, {"nodes": ["text"]}],
)
def test_wrong_arguments_are_refused(output, wrong):
    arguments = {"nodes": some_nodes(1), "llm": FakeLLM(), "output_path": output, **wrong}
    with pytest.raises(ConfigError):
        generate_qa_embedding_pairs(**arguments)


def test_no_nodes_is_an_error_that_says_so(output):
    with pytest.raises(ValueError, match="0 node"):
        generate([], FakeLLM(), output)
