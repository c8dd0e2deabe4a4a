"""oneDNN's product in the place of torch's: the same vectors, whatever happens to the weights."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers.activations import GELUActivation

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.embedding.encode import encode
from llama_index_lora_embed.models.kernels import linear
from tests.conftest import make_dataset

TEXTS = list(make_dataset().corpus.values())


@pytest.fixture
def counted(monkeypatch):
    """How many products oneDNN computed."""
    calls, multiply = [], linear._multiply

    def counting(*args):
        calls.append(args)
        return multiply(*args)

    monkeypatch.setattr(linear, "_multiply", counting)
    return calls


needs_onednn = pytest.mark.skipif(not linear._is_right(), reason="torch has no oneDNN here")


@needs_onednn
@pytest.mark.parametrize("task", ["query", "document"])
def test_vectors_are_those_of_sentence_transformers(tiny_model, counted, task):
    model = SentenceTransformer(tiny_model, device="cpu")
    plain = (model.encode_query if task == "query" else model.encode_document)(TEXTS)
    assert np.abs(encode(model, TEXTS, task) - plain).max() < 1e-6
    assert counted, "oneDNN was asked"
    before = len(counted)
    assert np.abs(encode(model, TEXTS, task, fused=False) - plain).max() < 1e-6
    assert len(counted) == before
    assert not [layer for layer in model.modules() if "forward" in layer.__dict__], "nothing stays behind"


@needs_onednn
def test_weights_that_change_are_ordered_again(counted):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)

    def fused():
        with torch.inference_mode(), linear.fast_linear(model.modules()):
            return model(x)

    def changed(change):
        change()
        with torch.no_grad():
            expected = model(x)
        assert torch.allclose(fused(), expected, atol=1e-5)
        return expected

    layer = model[0]
    first = changed(lambda: None)

    def in_place():
        with torch.no_grad():
            layer.weight.mul_(2)

    def replaced():
        layer.weight = nn.Parameter(torch.randn(32, 64))

    def data_replaced():
        layer.weight.data = torch.randn(32, 64)

    for change in (in_place, replaced, data_replaced):
        second = changed(change)
        assert not torch.allclose(first, second)
        first = second
    assert len(counted) == 4


@needs_onednn
def test_gradients_autocast_and_empty_batches_go_torchs_way(counted):
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(3, 64)
    with linear.fast_linear(model.modules()):
        model(x).sum().backward()
        assert model[0].weight.grad is not None
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert model(torch.zeros(0, 64)).shape == (0, 32)
            assert model(x.double().float()).shape == (3, 32)
    assert len(counted) == 1


@needs_onednn
def test_gelu_takes_no_memory_of_its_own_where_nothing_is_learnt(counted):
    model, x = nn.Sequential(nn.Linear(64, 32), GELUActivation()), torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
    kept = []
    model[0].register_forward_hook(lambda *args: kept.append(args[2]))
    with linear.fast_linear(model.modules()):
        with torch.inference_mode():
            made = model(x)
        assert kept[0].data_ptr() == made.data_ptr()
        assert torch.allclose(made, expected, atol=1e-6)
        learnt = model(x)
    assert kept[1].data_ptr() != learnt.data_ptr()
    learnt.sum().backward()
    assert model[0].weight.grad is not None
    assert not [module for module in model if "forward" in module.__dict__]


def test_somebody_elses_forward_stays():
    gelu = GELUActivation()
    gelu.forward = lambda x: x + 7
    with torch.inference_mode(), linear.fast_linear([nn.Linear(2, 2), gelu]):
        assert float(gelu(torch.zeros(1))) == 7
    assert float(gelu(torch.zeros(1))) == 7


@needs_onednn
def test_whoever_has_the_model_may_change_it_in_any_way(adapter, counted):
    embed_model = LoraEmbedding(adapter, merge=False, device="cpu")
    before = np.array(embed_model.get_text_embedding(TEXTS[0]))
    asked = len(counted)
    assert asked
    for name, parameter in embed_model.sentence_transformer.named_parameters():
        if "query" in name and "weight" in name and "lora" not in name:
            parameter.data.mul_(3)  # which no version counts
    after = np.array(embed_model.get_text_embedding(TEXTS[0]))
    assert np.abs(after - before).max() > 1e-4
    assert len(counted) == asked


def test_another_torch_and_large_models_go_torchs_way(monkeypatch, counted):
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
    for name, value in (("_MOST_BYTES", 10), ("_is_right", lambda: False)):
        with monkeypatch.context() as patch:
            patch.setattr(linear, name, value)
            with torch.inference_mode(), linear.fast_linear(model.modules()):
                assert torch.equal(model(x), expected)
    assert not counted
