"""Fused operations of decoders are the operations of transformers. tests/test_gpu.py trains with them."""

import inspect
from importlib import import_module

import pytest
import torch
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.models.kernels.decoders import _ROPE, FAMILIES, _norm, fused_decoder
from tests.architectures import qwen3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_of_transformers_are_what_is_replaced(family):
    modeling = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    assert {f"{family}{part}" for part in ("Model", "Attention", "MLP", "RMSNorm")} <= vars(modeling).keys()
    assert list(inspect.signature(getattr(modeling, _ROPE)).parameters)[:4] == ["q", "k", "cos", "sin"]
    norm = getattr(modeling, f"{family}RMSNorm")(16, eps=1e-4)
    torch.manual_seed(0)
    norm.weight.data.normal_()
    x = torch.randn(3, 5, 16, requires_grad=True)
    upstream = torch.randn(3, 5, 16)
    expected, found = norm(x), _norm(norm, x)
    assert torch.allclose(found, expected, atol=1e-6)
    (theirs,), (ours,) = (torch.autograd.grad(y, x, upstream, retain_graph=True) for y in (expected, found))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert float(theirs.abs().max()) > 0.1


def test_on_a_processor_the_operations_stay(tmp_path):
    model = SentenceTransformer(str(qwen3(tmp_path / "qwen3")), device="cpu")
    before = vars(model.transformers_model.layers[0].mlp).copy()
    with fused_decoder(model) as changed:
        assert changed == 0
        assert vars(model.transformers_model.layers[0].mlp) == before
