"""Blocked attention: scaled dot-product attention on CPUs in bfloat16, in blocks of scores that fit the CPU cache.

torch's CPU kernel takes half of a training step at 512 tokens, because its backward pass is slow on narrow heads (32
dimensions); all heads of a text in one batched product, on buffers that stay in the cache, take less than half of that
time (CONTRIBUTING.md). Texts of similar length share a block that is as long as its longest text, so padding costs
little. Everything else (float32, causal masks, dropout, position biases) goes to torch's kernel. Switch:
`TrainingSettings.fused_attention`. Delete this module when a training run with `fused_attention=False` is as fast:
`python benchmarks/speed.py --contenders d --settings default torchs-attention`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llama_index_lora_embed.models.kernels.packing import Span, packed_spans

NAME = "lora_embed_blocks"
"""Name of this attention in transformers' `AttentionInterface`."""
# Scores per block: 12 heads of 448 tokens, 5 MB in bfloat16. The fastest of 12 to 96 heads of that length.
_MAX_SCORES = 12 * 448 * 448
# A text of at least this many tokens gets a block of its own, without padding; shorter texts share blocks.
_MIN_TOKENS_ALONE = 128
_thread = threading.local()

Index = tuple[slice, slice, slice]  # texts, heads, tokens
Block = tuple[Index, Tensor | None]  # with its padding


class _BlockedAttention(torch.autograd.Function):
    """softmax(q kᵀ) v with the scores of only one block in memory.

    Arguments of `apply`: q (already scaled), k, v [texts, heads, tokens, dimensions] and the blocks. With
    P = softmax(q kᵀ) and g = do: dv = Pᵀ g, dP = g vᵀ, dS = P ∘ (dP - Σ P ∘ dP), dq = dS k, dk = dSᵀ q. The backward
    pass recomputes P.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
        out = _zeros_by_token(v)
        with torch.autocast("cpu", enabled=False):
            for index, padding in blocks:
                probabilities = _probabilities(_flat(q[index]), _flat(k[index]), padding)
                _write(torch.bmm(probabilities, _flat(v[index])), out, index)
        ctx.save_for_backward(q, k, v)
        ctx.blocks = blocks
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (_zeros_by_token(x) for x in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            for index, padding in ctx.blocks:
                queries, keys, values, g = (_flat(x[index]) for x in (q, k, v, grad.to(v.dtype)))
                probabilities = _probabilities(queries, keys, padding)
                _write(torch.bmm(g.transpose(1, 2), probabilities).transpose(1, 2), dv, index)
                d_scores = torch.bmm(g, values.transpose(1, 2), out=_buffer(1, queries, keys))
                torch._softmax_backward_data(d_scores, probabilities, -1, probabilities.dtype, grad_input=d_scores)
                _write(torch.bmm(d_scores, keys), dq, index)
                _write(torch.bmm(queries.transpose(1, 2), d_scores).transpose(1, 2), dk, index)
        return dq, dk, dv, None


class _AttentionByText(torch.autograd.Function):
    """torch's attention in float32 for the texts of a packed row, one after the other.

    Arguments of `apply`: q, k, v [1, heads, tokens, dimensions], the span of each text, and the scale of the scores.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: list[Span], scale: float) -> Tensor:
        out = _zeros_by_token(v)
        sums = []  # logarithms of the softmax's sums, for the backward pass
        for start, end in spans:
            parts = (x[:, :, start:end] for x in (q, k, v))
            made, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, scale=scale)
            out[:, :, start:end] = made
            sums.append(logarithm)
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *sums = ctx.saved_tensors
        gradients = [_zeros_by_token(x) for x in (q, k, v)]
        for (start, end), logarithm in zip(ctx.spans, sums, strict=True):
            parts = (x[:, :, start:end] for x in (grad, q, k, v, out))
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *parts, logarithm, 0.0, False, scale=ctx.scale
            )
            for whole, part in zip(gradients, made, strict=True):
                whole[:, :, start:end] = part
        return *gradients, None, None


def _zeros_by_token(like: Tensor) -> Tensor:
    """Zeros [texts, heads, tokens, dimensions] with the memory layout [texts, tokens, heads, dimensions]."""
    texts, heads, tokens, width = like.shape
    return like.new_zeros(texts, tokens, heads, width).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[texts, heads, tokens, dimensions] as [texts · heads, tokens, dimensions], contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _write(block: Tensor, out: Tensor, index: Index) -> None:
    """Copy a block [texts · heads, tokens, dimensions] to its index in `out`."""
    target = out[index]
    target.copy_(block.unflatten(0, target.shape[:2]))  # type: ignore[no-untyped-call]


def _blocks(spans: list[Span], heads: int) -> Iterator[Block]:
    """Index of each block in [texts, heads, tokens], and its padding mask, bool [texts · heads, 1, tokens].

    Short neighbours share a block of at most `_MAX_SCORES` scores; a text with more scores is split by heads.
    """
    first = 0
    while first < len(spans):
        start, end = spans[first]
        last = first + 1
        while last < len(spans):
            wider = min(start, spans[last][0]), max(end, spans[last][1])
            longest = wider[1] - wider[0]
            if longest >= _MIN_TOKENS_ALONE or (last + 1 - first) * heads * longest**2 > _MAX_SCORES:
                break
            (start, end), last = wider, last + 1
        step = heads if last > first + 1 else max(1, min(heads, _MAX_SCORES // (end - start) ** 2))
        padding = None
        if any(span != (start, end) for span in spans[first:last]):
            tokens, bounds = torch.arange(start, end), torch.tensor(spans[first:last])
            padding = ((tokens < bounds[:, :1]) | (tokens >= bounds[:, 1:])).repeat_interleave(step, 0)[:, None]
        for head in range(0, heads, step):
            yield (slice(first, last), slice(head, head + step), slice(start, end)), padding
        first = last


def _probabilities(queries: Tensor, keys: Tensor, padding: Tensor | None) -> Tensor:
    """softmax(q kᵀ) [texts · heads, tokens, tokens] in buffer 0."""
    scores = torch.bmm(queries, keys.transpose(1, 2), out=_buffer(0, queries, keys))
    if padding is not None:
        scores.masked_fill_(padding, float("-inf"))
    return torch.softmax(scores, dim=-1, out=scores)


def _buffer(number: int, queries: Tensor, keys: Tensor) -> Tensor:
    """A reused buffer of this thread for a block's scores; allocating it anew costs as much as filling it."""
    buffers: dict[tuple[int, torch.dtype], Tensor] = _thread.__dict__.setdefault("buffers", {})
    shape = (queries.shape[0], queries.shape[1], keys.shape[1])
    size = shape[0] * shape[1] * shape[2]
    key = (number, queries.dtype)
    if key not in buffers or buffers[key].numel() < size:
        with torch.inference_mode(False):
            buffers[key] = torch.empty(size, dtype=queries.dtype)
    return buffers[key][:size].view(shape)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function with the signature of transformers' `AttentionInterface`.

    It computes in blocks on a CPU in bfloat16 if every token of a text attends to all others, there are as many key as
    query heads, and there is no dropout and no bias; otherwise it calls `sdpa_attention_forward`, which in float32 is
    as fast. Scores are rounded to bfloat16 before the softmax, as in transformers' eager attention; torch's kernel
    rounds after it. On a batch of tenk with MiniLM the gradient's cosine with that of torch's kernel is 0.9999.

    Args:
        module: The attention layer.
        query: [texts, heads, tokens, dimensions].
        key: [texts, heads, tokens, dimensions].
        value: [texts, heads, tokens, dimensions].
        attention_mask: Mask from `sdpa_mask`: None, or bool [texts, 1, tokens, tokens].
        dropout: Dropout probability of the attention weights.
        scaling: Factor of the scores; None for 1 / √dimensions.
        is_causal: Whether a token attends to earlier tokens only; None takes `module.is_causal`.
        **kwargs: Passed to `sdpa_attention_forward`.

    Returns:
        [texts, tokens, heads, dimensions], and None in place of the attention weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # rotary embeddings return float32; torch's kernel casts its inputs, too
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    supported = (
        query.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and dropout == 0
        and not any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
        and not kwargs.get("output_attentions")
        and query.shape == key.shape
        and query.shape[:3] == value.shape[:3]
        and query.dtype in (torch.bfloat16, torch.float32)
        and not (attention_mask is None and causal)
    )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    packed = packed_spans(query) if supported else None
    if packed is not None and query.dtype == torch.float32:
        by_text: Tensor = _AttentionByText.apply(query, key, value, packed, scaling)  # type: ignore[no-untyped-call]
        return by_text.transpose(1, 2), None
    if packed is not None:
        blocks = [block for span in packed for block in _blocks([span], query.shape[1])]
    else:
        spans = _spans(query, attention_mask) if supported and query.dtype == torch.bfloat16 else None
        blocks = [] if spans is None else list(_blocks(spans, query.shape[1]))
    if not blocks:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return result
    out: Tensor = _BlockedAttention.apply(query * scaling, key, value, blocks)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


def _spans(query: Tensor, mask: Tensor | None) -> list[Span] | None:
    """Span of each text, or None if the mask is not a plain padding mask."""
    texts, _, tokens, _ = query.shape
    if mask is None:
        return [(0, tokens)] * texts
    cached: tuple[Tensor, list[Span] | None] | None = getattr(_thread, "spans", None)
    if cached is None or cached[0] is not mask:  # all layers of a forward pass share one mask
        _thread.spans = cached = (mask, _spans_of_mask(mask, texts, tokens))
    return cached[1]


def _spans_of_mask(mask: Tensor, texts: int, tokens: int) -> list[Span] | None:
    if mask.dtype != torch.bool or mask.shape != (texts, 1, tokens, tokens) or bool((mask != mask[:, :, :1]).any()):
        return None
    seen = mask[:, 0, 0]
    starts = seen.int().argmax(dim=1)
    counts = seen.sum(dim=1)
    positions = torch.arange(tokens)
    contiguous = (positions >= starts[:, None]) & (positions < (starts + counts)[:, None])
    if bool((contiguous != seen).any()) or bool((counts == 0).any()):
        return None
    return [(int(start), int(start + count)) for start, count in zip(starts, counts, strict=True)]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def blocked_attention(model: nn.Module) -> Iterator[int]:
    """Replace torch's attention by `attention` in a model.

    Args:
        model: Its configurations are changed in place and restored on exit.

    Yields:
        Number of configurations changed; 0 if the model does not use torch's attention.
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]

    def replace_sdpa(name: str) -> None:
        # `modules()` yields parents first, which matters: setting a configuration also sets the ones nested in it
        for config, implementation in before:
            config._attn_implementation = name if implementation == "sdpa" else implementation

    replace_sdpa(NAME)
    try:
        yield sum(implementation == "sdpa" for _, implementation in before)
    finally:
        replace_sdpa("sdpa")
        _thread.__dict__.clear()
