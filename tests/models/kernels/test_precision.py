"""bfloat16 autocast gives float32's gradients up to rounding."""

import os

import pytest
import torch
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.models.kernels import precision
from llama_index_lora_embed.models.kernels.precision import autocast, resolve_precision
from tests.helpers.gradients import gradients, prepared

CPU = torch.device("cpu")


def test_parity_with_torch_in_float32(tiny_model):
    model, loss, batch = prepared(tiny_model)
    expected = gradients(model, loss, batch)
    with autocast("fp32", CPU):
        same = gradients(model, loss, batch)
    assert same[0] == expected[0]
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in same[1].items())
    with autocast("bf16", CPU):
        rounded = gradients(model, loss, batch)
    assert rounded[0] == pytest.approx(expected[0], rel=0.01)
    ours, theirs = (torch.cat([g.flatten() for g in of[1].values()]) for of in (rounded, expected))
    assert 0.999 < float(torch.cosine_similarity(ours, theirs, dim=0)) < 1
    assert all(gradient.dtype == torch.float32 for gradient in rounded[1].values())


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "avx512"])
@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_auto_is_bfloat16_only_where_a_cpu_computes_it_natively_and_faster(monkeypatch, tiny_model, capability, faster):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    timed = []

    def seconds(size, dtype):
        timed.append(size)
        return 1.0 if dtype == faster else 2.0

    monkeypatch.setattr(precision, "_CHOSEN", {})
    monkeypatch.setattr(precision, "_seconds", seconds)
    expected = "bf16" if "bf16" in capability and faster == torch.bfloat16 else "fp32"
    model = SentenceTransformer(tiny_model, device="cpu")
    for _ in range(2):  # timed once
        assert resolve_precision("auto", CPU, model) == expected
    assert len(timed) == (2 if "bf16" in capability else 0)
    assert resolve_precision("auto", torch.device("mps")) == "fp32"
    assert [resolve_precision(wanted, CPU) for wanted in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_products_of_both_precisions_are_timed():
    assert all(0 < precision._seconds((64, 32), dtype) < 1 for dtype in (torch.bfloat16, torch.float32))


def test_kernel_caches_are_bounded_unless_the_user_has_set_them(monkeypatch):
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    autocast("fp32", CPU)
    assert not set(names) & set(os.environ)
    monkeypatch.setenv(names[0], "7")
    autocast("bf16", CPU)
    assert os.environ[names[0]] == "7"
    assert 0 < int(os.environ[names[1]]) < 1024
