"""oneDNN's product gives the vectors of torch's product, also after the weights have changed."""

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
def products(monkeypatch):
    """The products that oneDNN computed."""
    calls, multiply = [], linear._multiply

    def counting(*args):
        calls.append(args)
        return multiply(*args)

    monkeypatch.setattr(linear, "_multiply", counting)
    return calls


needs_onednn = pytest.mark.skipif(not linear._is_available(), reason="this build of torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("task", ["query", "document"])
def test_parity_with_torch(tiny_model, products, task):
    model = SentenceTransformer(tiny_model, device="cpu")
    plain = (model.encode_query if task == "query" else model.encode_document)(TEXTS)
    assert np.abs(encode(model, TEXTS, task) - plain).max() < 1e-6
    assert products, "oneDNN was used"
    before = len(products)
    assert np.abs(encode(model, TEXTS, task, fused=False) - plain).max() < 1e-6
    assert len(products) == before
    assert not [layer for layer in model.modules() if "forward" in layer.__dict__], "the model is restored"


@needs_onednn
def test_changed_weights_are_reordered(products):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)

    def fused():
        with torch.inference_mode(), linear.onednn_linear(model.modules()):
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
    assert len(products) == 4


@needs_onednn
def test_torch_computes_gradients_autocast_and_empty_batches(products):
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(3, 64)
    with linear.onednn_linear(model.modules()):
        model(x).sum().backward()
        assert model[0].weight.grad is not None
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert model(torch.zeros(0, 64)).shape == (0, 32)
            assert model(x.double().float()).shape == (3, 32)
    assert len(products) == 1


@needs_onednn
def test_gelu_works_in_place_unless_gradients_are_enabled(products):
    model, x = nn.Sequential(nn.Linear(64, 32), GELUActivation()), torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
    outputs = []
    model[0].register_forward_hook(lambda *args: outputs.append(args[2]))
    with linear.onednn_linear(model.modules()):
        with torch.inference_mode():
            inferred = model(x)
        assert outputs[0].data_ptr() == inferred.data_ptr()
        assert torch.allclose(inferred, expected, atol=1e-6)
        trained = model(x)
    assert outputs[1].data_ptr() != trained.data_ptr()
    trained.sum().backward()
    assert model[0].weight.grad is not None
    assert not [module for module in model if "forward" in module.__dict__]


def test_a_forward_that_was_replaced_before_is_kept():
    gelu = GELUActivation()
    gelu.forward = lambda x: x + 7
    with torch.inference_mode(), linear.onednn_linear([nn.Linear(2, 2), gelu]):
        assert float(gelu(torch.zeros(1))) == 7
    assert float(gelu(torch.zeros(1))) == 7


@needs_onednn
def test_a_model_that_was_handed_out_may_be_changed_in_any_way(adapter, products):
    embed_model = LoraEmbedding(adapter, merge=False, device="cpu")
    before = np.array(embed_model.get_text_embedding(TEXTS[0]))
    before_change = len(products)
    assert before_change
    for name, parameter in embed_model.sentence_transformer.named_parameters():
        if "query" in name and "weight" in name and "lora" not in name:
            parameter.data.mul_(3)  # a change that no version counter sees
    after = np.array(embed_model.get_text_embedding(TEXTS[0]))
    assert np.abs(after - before).max() > 1e-4
    assert len(products) == before_change


def test_the_switch_another_build_and_large_models_leave_the_product_to_torch(monkeypatch, products):
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
    changes = (
        (torch.backends.mkldnn, "enabled", False),
        (linear, "_MAX_BYTES", 10),
        (linear, "_agrees_with_torch", lambda: False),
    )
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with torch.inference_mode(), linear.onednn_linear(model.modules()):
                assert torch.equal(model(x), expected)
    assert not products
