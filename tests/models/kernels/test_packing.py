"""Layers without padding give the loss and the gradients of layers with padding."""

import pytest
import torch

from llama_index_lora_embed.models.kernels.attention import blocked_attention
from llama_index_lora_embed.models.kernels.lora import fused_lora
from llama_index_lora_embed.models.kernels.packing import packed_layers
from tests.architectures import ARCHITECTURES
from tests.helpers.gradients import assert_same, chunks, gradients, prepared

PACKED = {"bert", "roberta", "xlm-roberta"}


def with_padding(path):
    """Model, loss and a batch in which every other text is shorter."""
    model, loss, batch = prepared(path)
    for name, mask in batch.items():
        if name.endswith("attention_mask"):
            mask[::2, -2:] = 0
    return model, loss, batch


def rows_seen(model, loss, batch):
    """Rows and tokens of the hidden states in the first layer, of each pass."""
    seen = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layer.0"))
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    loss(chunks(batch), batch["label"])
    hook.remove()
    return seen


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_parity_with_padded_layers(name, tmp_path):
    model, loss, batch = with_padding(ARCHITECTURES[name].make(tmp_path / name))
    plain = gradients(model, loss, batch)
    with fused_lora(model), blocked_attention(model), packed_layers(model) as stacks:
        assert stacks == (name in PACKED)
        assert_same(gradients(model, loss, batch), plain)
        if stacks:
            masks = [chunk["attention_mask"] for chunk in chunks(batch)]
            assert {(1, int(mask.sum())) for mask in masks} <= set(rows_seen(model, loss, batch))
    assert_same(gradients(model, loss, batch), plain)


@pytest.mark.parametrize("name", sorted(PACKED))
def test_parity_in_bfloat16(name, tmp_path):
    model, loss, batch = with_padding(ARCHITECTURES[name].make(tmp_path / name))

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.cat([gradient.flatten() for gradient in gradients(model, loss, batch)[1].values()])

    plain = step()
    with fused_lora(model), blocked_attention(model):
        blocked = step()
        with packed_layers(model):
            packed = step()
    similar = [float(torch.cosine_similarity(made, plain, dim=0)) for made in (blocked, packed)]
    assert min(similar) > 0.999
    assert similar[1] > 1 - 2 * (1 - similar[0]), "no further from torch's than with padding"


def test_evaluations_and_other_masks_are_computed_as_they_are(tiny_model):
    model, loss, batch = with_padding(tiny_model)
    with blocked_attention(model), packed_layers(model):
        with torch.inference_mode():
            assert all(rows > 1 for rows, _ in rows_seen(model, loss, batch))
        features = {key: value for key, value in chunks(batch)[0].items() if key != "text_ids"}
        features["attention_mask"][0] = 0  # a text without tokens
        with torch.no_grad():
            made = model(features)["token_embeddings"]
        assert made.shape[:2] == features["input_ids"].shape
