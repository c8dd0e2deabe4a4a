"""The fused LoRA step gives peft's loss, gradients and vectors."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.models.kernels.lora import _FrozenLinearWithLora, fused_lora
from tests.architectures import ARCHITECTURES
from tests.conftest import make_dataset
from tests.helpers.gradients import assert_same, gradients, prepared


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_parity_with_peft_on_every_architecture(name, tmp_path):
    model, loss, batch = prepared(ARCHITECTURES[name].make(tmp_path / name))
    plain = gradients(model, loss, batch)
    with fused_lora(model) as changed:
        assert changed == 2 * len(ARCHITECTURES[name].targets)
        assert_same(gradients(model, loss, batch), plain)
    assert_same(gradients(model, loss, batch), plain)


@pytest.mark.parametrize("tokens", [3, 200])
def test_weights_with_the_lora_added_give_the_gradients_of_the_formula(tokens):
    torch.manual_seed(0)
    x, down, up = (torch.randn(shape, requires_grad=True) for shape in ((tokens, 24), (4, 24), (40, 4)))
    weight, bias = torch.randn(40, 24), torch.randn(40)
    made = _FrozenLinearWithLora.apply(x, weight, bias, down, up, 0.5)
    assert made.grad_fn.merged == (tokens == 200)
    expected = torch.nn.functional.linear(x, weight, bias) + 0.5 * (x @ down.T) @ up.T
    g = torch.randn(tokens, 40)
    assert torch.allclose(made, expected, atol=1e-4)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, down, up), g) for y in (made, expected)), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_parity_with_peft_under_autocast_with_less_memory(tiny_model):
    # without chunks, which reuse freed memory, so that it would be counted once or twice at random
    model, loss, batch = prepared(tiny_model, objective=ObjectiveSettings(mini_batch_size=None))

    def bytes_saved(run):
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = run()
        return result, sum(seen.values())

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(model, loss, batch)

    plain, before = bytes_saved(step)
    with fused_lora(model):
        fused, after = bytes_saved(step)
    assert after < 0.9 * before
    for name, gradient in plain[1].items():
        assert float(torch.cosine_similarity(fused[1][name].flatten(), gradient.flatten(), dim=0)) > 0.999


def test_weights_that_bfloat16_holds_exactly_are_kept_only_in_bfloat16(tiny_model):
    model, loss, batch = prepared(tiny_model)
    texts = list(make_dataset().corpus.values())
    frozen = {name: module for name, module in model.named_modules() if name.endswith(".base_layer")}
    with torch.no_grad():
        for number, module in enumerate(frozen.values()):
            if number % 2:  # as in a base that was stored in bfloat16
                module.weight.copy_(module.weight.to(torch.bfloat16))
    before = {name: module.weight.detach().clone() for name, module in frozen.items()}
    vectors = model.encode(texts)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(model, loss, batch)

    def dtypes():
        return [module.weight.dtype for module in frozen.values()]

    with fused_lora(model):
        first = step()
        assert dtypes() == [torch.float32, torch.bfloat16] * (len(frozen) // 2)
        assert np.array_equal(model.encode(texts), vectors), "a float32 forward pass uses float32 weights"
        assert set(dtypes()) == {torch.float32}
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            model.encode(texts)
        again = step()
        assert dtypes().count(torch.bfloat16) == len(frozen) // 2
    assert again[0] == first[0]
    assert all(torch.equal(gradient, first[1][name]) for name, gradient in again[1].items())
    assert all(torch.equal(module.weight, before[name]) for name, module in frozen.items())
    assert set(dtypes()) == {torch.float32}


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=4, lora_dropout=0.1), LoraConfig(r=4, use_dora=True), LoraConfig(r=4, bias="lora_only")],
    ids=["dropout", "dora", "bias"],
)
def test_layers_with_dropout_dora_or_bias_keep_pefts_forward(tiny_model, config):
    model, _, _ = prepared(tiny_model, config)
    with fused_lora(model) as changed:
        assert changed == 0


def test_float32_forward_passes_without_gradients_are_pefts(tiny_model):
    model, _, _ = prepared(tiny_model)
    texts = list(make_dataset().corpus.values())
    before = model.encode(texts)
    with fused_lora(model):
        assert np.array_equal(model.encode(texts), before)
        model.disable_adapters()
        base = model.encode(texts)
        model.enable_adapters()
    assert np.abs(base - SentenceTransformer(tiny_model, device="cpu").encode(texts)).max() < 1e-5


def test_a_merged_lora_counts_once(tiny_model):
    model, _, _ = prepared(tiny_model)
    texts = list(make_dataset().corpus.values())
    with fused_lora(model), torch.autocast("cpu", dtype=torch.bfloat16):
        unmerged = model.encode(texts)
        for layer in (m for m in model.modules() if isinstance(m, LoraLinear)):
            layer.merge()
        assert np.abs(model.encode(texts) - unmerged).max() < 0.01
