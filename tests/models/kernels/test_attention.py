"""Blocked attention gives the result and the gradients of torch's attention."""

import threading

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn import functional

from llama_index_lora_embed.models.kernels import attention as module
from llama_index_lora_embed.models.kernels.attention import (
    NAME,
    _BlockedAttention,
    _blocks,
    attention,
    blocked_attention,
)
from tests.architectures import ARCHITECTURES
from tests.helpers.gradients import gradients, prepared

BIDIRECTIONAL = {"bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert", "nomic_bert", "gte"}


class Layer(torch.nn.Module):
    """The attribute that an attention function reads from its layer."""

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.is_causal = is_causal


def inputs(lengths, heads=3, width=8, dtype=torch.bfloat16, left=False):
    """q, k, v [texts, heads, tokens, width] with the memory layout of a model's projections, and the mask."""
    torch.manual_seed(0)
    longest = max(lengths)
    q, k, v = (
        torch.randn(len(lengths), longest, heads, width, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    at = torch.arange(longest)
    there = torch.stack([at >= longest - n if left else at < n for n in lengths])
    return q, k, v, there[:, None, None].expand(-1, 1, longest, longest).contiguous()


def test_the_gradient_matches_the_formula():
    q, k, v, _ = inputs([5, 5, 5], dtype=torch.float64)
    spans = [(0, 5), (1, 5), (0, 3)]

    def blocked(q, k, v):
        out = _BlockedAttention.apply(q, k, v, list(_blocks(spans, q.shape[1])))
        return torch.cat([out[i, :, a:b].flatten() for i, (a, b) in enumerate(spans)])

    def formula(q, k, v):
        parts = []
        for i, (a, b) in enumerate(spans):
            scores = q[i, :, a:b] @ k[i, :, a:b].transpose(-1, -2)
            parts.append((scores.softmax(-1) @ v[i, :, a:b]).flatten())
        return torch.cat(parts)

    assert torch.allclose(blocked(q, k, v), formula(q, k, v), atol=1e-12)
    assert torch.autograd.gradcheck(blocked, (q, k, v))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("lengths", [[4, 9, 7, 2], [9, 9], [1, 130, 40, 140], [300]])
def test_parity_with_torch_on_padded_texts(lengths, left):
    q, k, v, mask = inputs(lengths, left=left)
    there = mask[:, 0, 0][:, :, None, None]
    g = torch.randn(len(lengths), max(lengths), 3, 8, dtype=torch.bfloat16) * there
    blocked = attention(Layer(), q, k, v, mask)[0]
    ours = (blocked * there, *torch.autograd.grad(blocked, (q, k, v), g))
    in_float64 = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = functional.scaled_dot_product_attention(*in_float64, attn_mask=mask).transpose(1, 2)
    expected = (exact * there, *torch.autograd.grad(exact, in_float64, g.double()))
    in_bfloat16 = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torchs = (in_bfloat16 * there, *torch.autograd.grad(in_bfloat16, (q, k, v), g))
    for our, torchs_own, true in zip(ours, torchs, expected, strict=True):
        error, torchs_error = (
            float((x.detach().double() - true).norm().detach() / true.norm().detach()) for x in (our, torchs_own)
        )
        assert error < 0.01
        assert error < 3 * torchs_error + 1e-3, "no more than bfloat16's rounding"


def test_every_token_is_in_exactly_one_block_and_no_block_is_too_large(monkeypatch):
    monkeypatch.setattr(module, "_MAX_SCORES", 4000)
    spans = [(0, 20), (0, 12), (3, 20), (0, 130), (0, 500), (0, 1), (0, 128), (2, 3)]
    heads = 4
    covered = torch.zeros(len(spans), heads, 500, dtype=torch.int64)
    for index, padding in _blocks(spans, heads):
        shape = covered[index].shape
        scores = shape[0] * shape[1] * shape[2] ** 2
        assert scores <= 4000 or (shape[0] == shape[1] == 1), "one head of one text is never split"
        there = torch.ones(shape) if padding is None else 1 - padding[:, 0].view(shape).float()
        covered[index] += there.long()
    for text, (start, end) in enumerate(spans):
        assert (covered[text, :, start:end] == 1).all()
        assert covered[text].sum() == heads * (end - start)


@pytest.mark.parametrize(
    "change",
    ["float32", "dropout", "bias", "causal", "grouped", "odd mask", "holes", "empty text", "float mask"],
)
def test_torch_computes_what_blocks_do_not_support(change, monkeypatch):
    q, k, v, mask = inputs([6, 4])
    layer, more = Layer(), {}
    if change == "float32":
        q, k, v = q.float(), k.float(), v.float()
    elif change == "dropout":
        more["dropout"] = 0.5
    elif change == "bias":
        more["position_bias"] = torch.zeros(2, 3, 6, 6, dtype=q.dtype)
    elif change == "causal":
        layer, mask = Layer(is_causal=True), None
    elif change == "grouped":
        layer.num_key_value_groups, k, v = 3, k[:, :1], v[:, :1]
    elif change == "odd mask":
        mask = mask & torch.ones(6, 6, dtype=torch.bool).tril()
    elif change == "holes":
        mask[:, :, :, 2] = False
    elif change == "empty text":
        mask[1] = False
    elif change == "float mask":
        mask = torch.zeros(mask.shape, dtype=q.dtype)
    called = []
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *args, **kwargs: called.append(1) or (q, None))
    attention(layer, q, k, v, mask, **more)
    assert called


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_gradient_stays_the_same_on_every_architecture(name, tmp_path, monkeypatch):
    model, loss, batch = prepared(ARCHITECTURES[name].make(tmp_path / name))

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(model, loss, batch)

    used = []
    blocks = module._blocks
    monkeypatch.setattr(module, "_blocks", lambda *args: used.append(1) or blocks(*args))
    plain = step()
    assert not used
    with blocked_attention(model) as changed:
        fast = step()
    assert bool(used) == (bool(changed) and name in BIDIRECTIONAL), (changed, used[:1])
    ours, theirs = (torch.cat([g.flatten() for g in of[1].values()]) for of in (fast, plain))
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.999
    assert step()[0] == plain[0], "the model is restored"


def test_the_models_configuration_is_restored_after_an_error(tiny_model):
    model = SentenceTransformer(tiny_model, device="cpu")
    config = model.transformers_model.config

    def use():
        with blocked_attention(model) as changed:
            assert changed == 1
            assert config._attn_implementation == NAME
            with blocked_attention(model) as inner:
                assert inner == 0
            assert config._attn_implementation == NAME
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use()
    assert config._attn_implementation == "sdpa"
    assert NAME not in str(config.to_dict())


def test_threads_do_not_share_buffers():
    q, k, v, mask = inputs([40, 30, 20], heads=4)
    alone = attention(Layer(), q, k, v, mask)[0].detach()
    wrong = []

    def work(number):
        torch.manual_seed(number)
        for _ in range(30):
            if not torch.equal(attention(Layer(), q, k, v, mask)[0].detach(), alone):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nested_configurations_are_restored_to_their_own_attention():
    from transformers import CLIPConfig

    config = CLIPConfig()
    config._attn_implementation = "sdpa"
    config.vision_config._attn_implementation = "eager"

    class Composite(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.vision = torch.nn.Linear(1, 1)
            self.vision.config = config.vision_config

    with blocked_attention(Composite()) as changed:
        assert changed == 1
        assert (config._attn_implementation, config.vision_config._attn_implementation) == (NAME, "eager")
    assert (config._attn_implementation, config.vision_config._attn_implementation) == ("sdpa", "eager")


def test_the_fallback_passes_no_position_bias_to_releases_of_transformers_without_it(monkeypatch):
    def of_version_5_0(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
        return query, kwargs

    monkeypatch.setattr(module, "sdpa_attention_forward", of_version_5_0)
    q, k, v, mask = inputs([6, 4], dtype=torch.float32)
    assert attention(Layer(), q, k, v, mask, 0.0, scaling=0.1)[1] == {}
