"""`adapters`: the registry on the command line."""

import pytest

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.deployment import RunRegistry
from tests.helpers.cli import lora_embed, result_of


def test_versions_are_added_listed_and_shown(workplace):
    line = "--registry runs/new"
    assert lora_embed(f"adapters list {line}").stdout.strip() == "no versions yet"
    added = result_of(f"adapters add runs/handbook --data val.json --name first {line}")
    assert added["metrics"] == result_of("eval runs/handbook val.json")["metrics"]
    assert "first" in lora_embed(f"adapters list {line}").stdout
    assert "fingerprint" in lora_embed(f"adapters show first {line}").stdout
    missing = lora_embed(f"adapters show second {line}")
    assert missing.exit_code == 1
    assert "expected one of: first" in missing.stderr


def test_a_version_is_promoted_behind_a_gate_and_rolled_back(workplace):
    registry = RunRegistry("runs/registry")
    assert registry.promoted().name == "v2"
    result_of("adapters add runs/handbook --data val.json --name again")
    assert result_of("adapters promote again")["gate"]["passed"]
    assert registry.promoted().name == "again"
    assert result_of("adapters rollback") == {"promoted": "v2"}
    assert result_of("adapters rollback") == {"promoted": "again"}
    result_of("adapters add runs/handbook --name unseen")
    refused = lora_embed("adapters promote unseen")
    assert refused.exit_code == 1
    assert "both evaluated on the same dataset" in refused.stderr
    assert result_of("adapters promote unseen --no-gate")["promoted"] == "unseen"


def test_a_version_that_does_not_pass_the_gate_is_exit_code_3(workplace, adapter):
    from llama_index_lora_embed import evaluate_retrieval
    from tests.conftest import make_dataset

    val = make_dataset(passages=10, seed=7, prefix="v")
    worse = evaluate_retrieval(LoraEmbedding(base_model="base"), val)
    RunRegistry("runs/registry").add("runs/handbook", dataset=val, evaluation=worse, name="worse")
    found = result_of("adapters promote worse", code=3)
    assert not found["passed"]
    assert RunRegistry("runs/registry").promoted().name == "v2"


def test_a_rollback_needs_an_earlier_version(workplace):
    result_of("adapters add runs/handbook --registry runs/new")
    assert lora_embed("adapters rollback --registry runs/new").exit_code == 1
    result_of("adapters promote v1 --registry runs/new")
    done = lora_embed("adapters rollback --registry runs/new")
    assert done.exit_code == 1
    assert "two promoted versions" in done.stderr


def test_adapters_are_merged_with_their_weights(workplace):
    found = result_of("adapters merge runs/half runs/handbook runs/previous --weights 0.25 --weights 0.25")
    assert found["weights"] == [0.25, 0.25]
    half, merged = LoraEmbedding("runs/handbook", adapter_scale=0.5), LoraEmbedding("runs/half")
    assert merged.get_text_embedding("w1 w2") == pytest.approx(half.get_text_embedding("w1 w2"), abs=1e-5)
