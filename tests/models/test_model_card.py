"""The model card's code: what it shows gives the vectors of `LoraEmbedding`."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.models.adapter_directory import Manifest
from llama_index_lora_embed.models.model_card import model_card
from tests.architectures import ARCHITECTURES, qwen3
from tests.helpers.adapters import random_adapter


def peft_code(card):
    """The block of code under "In peft:", if there is one."""
    found = re.search(r"^In peft:\n\n```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    return found and found[1]


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "nomic_bert", "qwen3", "qwen3-right", "mistral", "llama"])
def test_the_code_for_peft_gives_the_adapters_vectors(tmp_path, name):
    architecture = ARCHITECTURES[name]
    path = random_adapter(str(architecture.make(tmp_path)), tmp_path / "run", 3, target_modules=architecture.targets)
    code = peft_code(model_card(Manifest.read(path), str(path)))
    names: dict = {}
    exec(code, names)
    embed_model = LoraEmbedding(path, device="cpu")
    expected = [embed_model.get_query_embedding("a query"), embed_model.get_text_embedding("a passage")]
    assert np.abs(names["vectors"].numpy() - np.array(expected)).max() < 1e-5


def test_the_code_for_peft_of_an_adapter_for_queries_embeds_a_query(adapter):
    assert "a passage" in peft_code(model_card(Manifest.read(adapter)))
    for_queries = peft_code(model_card(replace(Manifest.read(adapter), tune="query")))
    assert "a query" in for_queries
    assert "a passage" not in for_queries


def test_no_code_for_peft_where_a_line_of_pooling_would_not_do(tmp_path, adapter, tiny_model):
    manifest = Manifest.read(adapter)
    assert peft_code(model_card(manifest))
    heads = random_adapter(str(ARCHITECTURES["gemma3"].make(tmp_path / "heads")), tmp_path / "gemma", 3,
                           target_modules=["q_proj"])  # fmt: skip
    windows = random_adapter(tiny_model, tmp_path / "windows", 3, window=16)
    unusual = random_adapter(tiny_model, tmp_path / "max", 3, pooling="max")
    causal = random_adapter(tiny_model, tmp_path / "causal", 3, task_type="CAUSAL_LM")
    assert json.loads((causal / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    skipping = qwen3(tmp_path / "skipping", pooling="mean", include_prompt=False)
    skips = random_adapter(str(skipping), tmp_path / "skips", 3, target_modules=["q_proj"])
    others = [Manifest.read(path) for path in (heads, windows, unusual, causal, skips)]
    # earlier versions recorded no task type
    others.append(replace(manifest, lora={"r": 4, "lora_alpha": 8, "target_modules": ["query"]}))
    assert [peft_code(model_card(other)) for other in others] == [None] * 6
