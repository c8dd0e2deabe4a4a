"""Plain peft and transformers on an adapter directory, and this package on what peft saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from llama_index_lora_embed import LoraEmbedding

pytestmark = pytest.mark.extended

TEXTS = ["w1 w2 w3", "w10 w20 w30 w40 w50", "w7"]


def mean_vectors(model: torch.nn.Module, tokenizer_path: Path | str) -> np.ndarray:
    """Vectors by transformers alone: mean of the token states, length 1."""
    tokens = AutoTokenizer.from_pretrained(tokenizer_path)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    vectors = (states * mask).sum(1) / mask.sum(1)
    return np.asarray(torch.nn.functional.normalize(vectors, dim=-1).numpy())


def test_peft_s_auto_class_loads_the_directory_and_pools_to_the_same_vectors(adapter: Path) -> None:
    model = AutoPeftModelForFeatureExtraction.from_pretrained(adapter)
    ours = LoraEmbedding(adapter).get_text_embedding_batch(TEXTS)
    np.testing.assert_allclose(mean_vectors(model, adapter), ours, atol=1e-5)


def test_a_lora_that_peft_saved_is_embedded_under_its_base_s_own_pooling(tiny_model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = get_peft_model(
        AutoModel.from_pretrained(tiny_model),
        LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False, task_type="FEATURE_EXTRACTION"),
    )
    made.save_pretrained(str(tmp_path / "lora"))
    found = LoraEmbedding(tmp_path / "lora", base_model=tiny_model)
    np.testing.assert_allclose(mean_vectors(made, tiny_model), found.get_text_embedding_batch(TEXTS), atol=1e-5)
    in_pool = LoraEmbedding(adapters={"lora": tmp_path / "lora"}, base_model=tiny_model, adapter="lora")
    np.testing.assert_allclose(
        in_pool.get_text_embedding_batch(TEXTS), found.get_text_embedding_batch(TEXTS), atol=1e-5
    )
    assert SentenceTransformer(tiny_model)[1].pooling_mode == "mean"  # what the expected vectors are made with
