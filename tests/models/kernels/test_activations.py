"""Activations in half of their size give the gradients of whole ones, up to rounding."""

import pytest
import torch
from torch import nn

from llama_index_lora_embed.models.kernels import activations as module
from llama_index_lora_embed.models.kernels.activations import Activations
from tests.architectures import ARCHITECTURES
from tests.helpers.gradients import assert_same, gradients, prepared


def kept_by(model, loss, batch):
    """Loss and gradients with kept activations, and the bytes of these."""
    held = Activations(model)
    with held.halved():
        made = gradients(model, loss, batch)
    return made, held.bytes


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_parity_with_whole_activations(name, tmp_path, monkeypatch):
    model, loss, batch = prepared(ARCHITECTURES[name].make(tmp_path / name))
    plain = gradients(model, loss, batch)
    assert_same(kept_by(model, loss, batch)[0], plain)  # they are too small to be halved
    monkeypatch.setattr(module, "_LEAST", 16)
    halved, _ = kept_by(model, loss, batch)
    assert halved[0] == plain[0], "forward passes are the same"
    ours, theirs = (torch.cat([gradient.flatten() for gradient in of[1].values()]) for of in (halved, plain))
    assert 0.9999 < float(torch.cosine_similarity(ours, theirs, dim=0)) < 1
    assert_same(gradients(model, loss, batch), plain)


def test_they_take_half(tiny_model, monkeypatch):
    model, loss, batch = prepared(tiny_model)
    whole = {}

    def pack(tensor):
        whole[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    loss.cached = False
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(model, loss, batch)
    before = sum(tensor.nbytes for place, tensor in whole.items() if place not in weights)
    monkeypatch.setattr(module, "_LEAST", 16)
    assert 0 < kept_by(model, loss, batch)[1] < 0.55 * before


def test_tensors_that_change_after_they_were_kept_are_kept_as_they_were():
    weight = nn.Parameter(torch.randn(4, 8))
    held = Activations(nn.Linear(1, 1))
    x = torch.randn(2, 8)
    expected = torch.autograd.grad((nn.functional.linear(x, weight) ** 2).sum(), weight)[0]
    with held.halved():
        for change in (False, True):
            given = x.clone()
            loss = (nn.functional.linear(given, weight) ** 2).sum()
            if change:
                given.zero_()
            assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)
    held.clear()
    assert held.bytes == 0


def test_views_are_restored_in_their_layout():
    held = Activations(nn.Linear(1, 1))
    x = torch.randn(3, 4, 5, requires_grad=True)
    with held.halved():
        views = [x.exp().transpose(0, 2), x.exp()[:, 1:], x.exp().reshape(3, 20), x.exp().expand(2, 3, 4, 5)]
        made = [(view * view).sum() for view in views]
    for loss, view in zip(made, views, strict=True):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        (expected,) = torch.autograd.grad((view * view).sum(), x, retain_graph=True)
        assert torch.equal(gradient, expected)
