"""One real LLM, end to end: SmolLM2-135M from a package, through transformers and LlamaIndex."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset

EXAMPLE = Path(__file__).parents[3] / "examples" / "local_llm.py"


@pytest.mark.slow
@pytest.mark.extended
def test_a_real_llm_writes_queries_and_the_filters_show_what_they_drop(tmp_path):
    def run():
        command = [sys.executable, str(EXAMPLE), "--nodes", "5", "--out", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    first = run()
    records = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()[1:]]
    assert len(records) == 5
    assert any(record["ok"] for record in records)
    assert "5 calls" in first
    assert "questions kept" in first
    dataset = EmbeddingQAFinetuneDataset.from_json(tmp_path / "dataset.json").check()
    assert all(origin.startswith("llm") for origin in dataset.query_origins.values())
    again = run()
    assert " 0 calls" in again
    # the splitter gives its nodes new ids in each run; answers belong to texts
    asked_again = EmbeddingQAFinetuneDataset.from_json(tmp_path / "dataset.json")
    assert list(asked_again.queries.values()) == list(dataset.queries.values())
