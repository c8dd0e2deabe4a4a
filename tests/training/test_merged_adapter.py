"""Evaluations in training compute with merged weights, and training goes on with the weights from before."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.embedding.encode import encode
from llama_index_lora_embed.training import lora
from llama_index_lora_embed.training.lora import add_lora, merged_adapter
from tests.conftest import WORDS, make_tiny_model

TEXTS = [" ".join(WORDS[i : i + 1 + i % 9]) for i in range(30)]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Layers of 64 features, which oneDNN computes where it can."""
    return str(make_tiny_model(tmp_path_factory.mktemp("wide"), width=64))


def trained(path, seed=0, **fields):
    model = SentenceTransformer(path, device="cpu")
    add_lora(model, LoraConfig(r=4, **fields) if fields else None, TrainingSettings())
    learn(model, seed)
    return model.eval()


def learn(model, seed):
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=drawn))


def test_merged_layers_give_the_same_vectors_and_the_weights_come_back_bit_for_bit(wide_model):
    model = trained(wide_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.encode(TEXTS)
    with merged_adapter(model):
        changed = [name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])]
        made = model.encode(TEXTS)
    assert len(changed) == 12, "six linear modules in each of two layers"
    assert np.abs(made - expected).max() < 1e-5
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert model.encode(TEXTS).tobytes() == expected.tobytes()


def test_each_evaluation_computes_with_the_weights_of_its_step(wide_model):
    model = trained(wide_model)
    for seed in (1, 2, 3):
        learn(model, seed)
        expected = model.encode_document(TEXTS)
        with merged_adapter(model):
            assert np.abs(encode(model, TEXTS, "document") - expected).max() < 1e-5
        assert np.abs(encode(model, TEXTS, "document") - expected).max() < 1e-5


def test_an_error_leaves_the_weights_as_they_were(wide_model):
    model = trained(wide_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), merged_adapter(model):
        raise KeyboardInterrupt
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "lora bias"])
def test_layers_with_more_than_a_product_stay_as_they_are(wide_model, fields):
    model = trained(wide_model, target_modules=["query"], **fields)
    expected = model.encode(TEXTS)
    with merged_adapter(model):
        assert model.encode(TEXTS).tobytes() == expected.tobytes()


def test_large_models_are_not_copied(wide_model, monkeypatch):
    monkeypatch.setattr(lora, "_MAX_MERGED_BYTES", 1000)
    model = trained(wide_model)
    expected = model.encode(TEXTS)
    with merged_adapter(model):
        assert model.encode(TEXTS).tobytes() == expected.tobytes()
