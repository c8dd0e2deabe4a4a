"""`embed`, `export` and `reindex`."""

import json
from pathlib import Path

import numpy as np
import pytest

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.deployment import open_index
from tests.helpers.cli import lora_embed, result_of


def test_embed_writes_the_vectors_of_the_model(workplace):
    texts = Path("texts.txt").read_text().splitlines()
    assert result_of("embed runs/handbook texts.txt --output out/vectors.npy")["texts"] == len(texts)
    expected = LoraEmbedding("runs/handbook").get_text_embedding_batch(texts)
    np.testing.assert_allclose(np.load("out/vectors.npy"), expected, atol=1e-6)
    lora_embed("embed runs/handbook texts.txt -o vectors.jsonl")
    lines = [json.loads(line) for line in Path("vectors.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == texts
    np.testing.assert_allclose([line["embedding"] for line in lines], expected, atol=1e-6)


def test_embed_prints_json_lines_of_queries(workplace):
    done = lora_embed("embed runs/handbook queries.txt --queries")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    expected = LoraEmbedding("runs/handbook").get_query_embedding(lines[0]["text"])
    np.testing.assert_allclose(lines[0]["embedding"], expected, atol=1e-6)


@pytest.mark.parametrize("line", ["texts.txt -o vectors.parquet", "missing.txt", "run.yaml"])
def test_embed_refuses_what_it_cannot_read_or_write(workplace, line):
    done = lora_embed(f"embed base {line}")
    assert done.exit_code == 1
    assert "error: got " in done.stderr


def test_a_merged_export_is_certified_and_is_the_adapter(workplace):
    found = result_of("export runs/handbook runs/merged --texts texts.txt")
    assert found["certificate"]["median_cosine"] > 0.9999
    refused = lora_embed("export runs/handbook runs/merged8 --texts texts.txt --precision int8")
    assert refused.exit_code == 1
    assert "expected 'fp32'" in refused.stderr
    assert not Path("runs/merged8").exists()


def test_reindex_builds_compares_and_switches(workplace):
    built = result_of("reindex runs/index nodes.jsonl base")
    assert built["switched"]
    line = "reindex runs/index nodes.jsonl runs/handbook --data nodes_val.json --before base --tolerance 1"
    better = result_of(line)
    assert better["previous"] == built["version"]
    assert open_index("runs/index", LoraEmbedding("runs/handbook"))


def test_an_index_that_is_refused_is_exit_code_3(workplace):
    result_of("reindex runs/index nodes.jsonl runs/handbook")
    few = json.loads(Path("nodes_val.json").read_text())
    kept = list(few["queries"])[:5]  # fewer than ten prove nothing
    for name in ("queries", "relevant_docs", "query_origins"):
        few[name] = {key: few[name][key] for key in kept}
    Path("few.json").write_text(json.dumps(few))
    done = lora_embed("reindex runs/index nodes.jsonl base --data few.json --before runs/handbook")
    assert done.exit_code == 3
    assert done.stdout.startswith("NOT SWITCHED")
    assert open_index("runs/index", LoraEmbedding("runs/handbook"))
