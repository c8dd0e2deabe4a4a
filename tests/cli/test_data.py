"""`generate` and `label`: datasets that training and evaluation read."""

from pathlib import Path

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from tests.helpers.cli import lora_embed, result_of


def test_generated_queries_are_those_of_a_run_and_can_be_trained_on(workplace):
    found = result_of("generate --nodes nodes.jsonl --model-id base --output generated.json --val-output held_out.json")
    train, val = (EmbeddingQAFinetuneDataset.from_json(name) for name in ("generated.json", "held_out.json"))
    assert found["data"]["queries"] == len(train.queries) > 0
    assert len(val.queries) > 0
    assert not set(train.queries) & set(val.queries)
    line = "train --dataset generated.json --val-dataset held_out.json --model-id base --epochs 1"
    assert result_of(f"{line} --model-output-path runs/generated")["steps"] == 1


def test_an_llm_is_named_by_its_class(workplace):
    line = "generate --nodes nodes.jsonl --model-id base --filters null --llm tests.helpers.llms:FakeLLM"
    found = result_of(f"{line} --llm-options '{{latency: 0.001}}' --output generated.json")
    assert found["data"]["queries"] == 24
    assert Path("generated.json.journal.jsonl").exists()
    wrong = lora_embed(line.replace("FakeLLM", "calm_answer"))
    assert wrong.exit_code == 1
    assert "which is no LLM class" in wrong.stderr
    assert lora_embed(f"{line} --llm-options oops").exit_code == 1
    assert lora_embed(line.replace("tests.helpers", "no.where")).exit_code == 1


def test_generate_without_nodes_says_what_is_missing(workplace):
    done = lora_embed("generate --model-id base")
    assert done.exit_code == 1
    assert "data.nodes" in done.stderr


def test_labels_of_a_terminal_become_a_validation_set(workplace):
    line = "label queries.txt nodes.jsonl --model base --output labelled.json --max-queries 2 --top-k 2"
    stopped = result_of(line, input="3\nq\n")
    assert stopped["report"]["unfinished"] > 0
    found = result_of(line, input="3\n" * 50)
    assert found["report"]["answered"] == 2
    dataset = EmbeddingQAFinetuneDataset.from_json("labelled.json")
    assert dataset.origins() == {"human": 2}
    assert result_of("eval base labelled.json")["origins"] == {"human": 2}
