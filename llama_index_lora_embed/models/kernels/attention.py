"""Attention on a processor, in blocks that its cache holds: what torch computes, in less than half the time.

torch's own kernel for processors takes half of a training step at 512 tokens: with heads of 32 dimensions its products
are too small to be fast. Those of all heads of a text together are large enough, and scores that are used up while they
are in the cache cost little to write. Texts of nearly one length share a block, and each block is as long as its own
longest text, so that padding costs little.
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

NAME = "lora_embed_blocks"
# scores in a block; 12 heads of 448 tokens, in bfloat16 5 MB. Measured best on 12 to 96 heads of that length: 12
_BLOCK = 12 * 448 * 448
# texts of as many tokens have blocks of their own, exactly as long as they are; shorter ones would make many small ones
_ALONE = 128
_scratch = threading.local()

Span = tuple[int, int]
Place = tuple[slice, slice, slice]


class _Blocks(torch.autograd.Function):
    """softmax(q kᵀ) v of texts that stand somewhere in their rows, the scores of one block at a time in memory.

    Arguments of `apply`: q, k, v [texts, heads, tokens, dimensions], with q scaled already, and the first and the last
    token (exclusive) of each text. With P = softmax(q kᵀ) and g = do: dv = Pᵀ g, dP = g vᵀ, dS = P ∘ (dP - Σ P ∘ dP),
    dq = dS k, dk = dSᵀ q. P is computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
        out = _empty(v)
        with torch.autocast("cpu", enabled=False):
            for at, blank in _blocks(spans, q.shape[1]):
                probabilities = _probabilities(_flat(q[at]), _flat(k[at]), blank)
                _put(torch.bmm(probabilities, _flat(v[at])), out, at)
        ctx.save_for_backward(q, k, v)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (_empty(x) for x in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            for at, blank in _blocks(ctx.spans, q.shape[1]):
                queries, keys, values, g = (_flat(x[at]) for x in (q, k, v, grad.to(v.dtype)))
                probabilities = _probabilities(queries, keys, blank)
                _put(torch.bmm(g.transpose(1, 2), probabilities).transpose(1, 2), dv, at)
                d_scores = torch.bmm(g, values.transpose(1, 2), out=_buffer(1, queries, keys))
                torch._softmax_backward_data(d_scores, probabilities, -1, probabilities.dtype, grad_input=d_scores)
                _put(torch.bmm(d_scores, keys), dq, at)
                _put(torch.bmm(queries.transpose(1, 2), d_scores).transpose(1, 2), dk, at)
        return dq, dk, dv, None


def _empty(like: Tensor) -> Tensor:
    """Zeros [texts, heads, tokens, dimensions], laid out by token, as the next layer reads them."""
    texts, heads, tokens, width = like.shape
    return like.new_zeros(texts, tokens, heads, width).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[texts, heads, tokens, dimensions] as [texts · heads, tokens, dimensions], contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _put(part: Tensor, whole: Tensor, at: Place) -> None:
    """Write [texts · heads, tokens, dimensions] where it belongs."""
    place = whole[at]
    place.copy_(part.unflatten(0, place.shape[:2]))  # type: ignore[no-untyped-call]


def _blocks(spans: list[Span], heads: int) -> Iterator[tuple[Place, Tensor | None]]:
    """Where each block lies in [texts, heads, tokens], and what of it is no text, bool [texts · heads, 1, tokens].

    Short neighbours share a block as long as it holds no more than `_BLOCK` scores; a text that holds more by itself
    is divided by heads.
    """
    first = 0
    while first < len(spans):
        start, end = spans[first]
        last = first + 1
        while last < len(spans):
            wider = min(start, spans[last][0]), max(end, spans[last][1])
            longest = wider[1] - wider[0]
            if longest >= _ALONE or (last + 1 - first) * heads * longest**2 > _BLOCK:
                break
            (start, end), last = wider, last + 1
        some = heads if last > first + 1 else max(1, min(heads, _BLOCK // (end - start) ** 2))
        blank = None
        if any(span != (start, end) for span in spans[first:last]):
            tokens, bounds = torch.arange(start, end), torch.tensor(spans[first:last])
            blank = ((tokens < bounds[:, :1]) | (tokens >= bounds[:, 1:])).repeat_interleave(some, 0)[:, None]
        for head in range(0, heads, some):
            yield (slice(first, last), slice(head, head + some), slice(start, end)), blank
        first = last


def _probabilities(queries: Tensor, keys: Tensor, blank: Tensor | None) -> Tensor:
    """softmax(q kᵀ) [texts · heads, tokens, tokens] in the first buffer."""
    scores = torch.bmm(queries, keys.transpose(1, 2), out=_buffer(0, queries, keys))
    if blank is not None:
        scores.masked_fill_(blank, float("-inf"))
    return torch.softmax(scores, dim=-1, out=scores)


def _buffer(number: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Room for the scores of a block, of this thread and used again: fresh memory costs as much as what is written."""
    held: dict[tuple[int, torch.dtype], Tensor] = _scratch.__dict__.setdefault("held", {})
    shape = (queries.shape[0], queries.shape[1], keys.shape[1])
    size = shape[0] * shape[1] * shape[2]
    key = (number, queries.dtype)
    if key not in held or held[key].numel() < size:
        with torch.inference_mode(False):
            held[key] = torch.empty(size, dtype=queries.dtype)
    return held[key][:size].view(shape)


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
    """An attention function as transformers calls it; everything that is not plain goes to torch.

    Scores are rounded to bfloat16 before the softmax, as in transformers' own eager attention; torch's kernel rounds
    after it. On a batch of tenk with MiniLM the cosine of the gradient to that of torch's is 0.9999.

    Plain is: on a processor in bfloat16, every token of a text sees every other, as many key as query heads, no
    dropout, no bias. In float32 torch's kernel is as fast.

    Args:
        module: The attention layer.
        query: [texts, heads, tokens, dimensions].
        key: The same.
        value: The same.
        attention_mask: As `sdpa_mask` makes it: None, or bool [texts, 1, tokens, tokens].
        dropout: Of the probabilities.
        scaling: Of the scores; None for 1 / √dimensions.
        is_causal: Whether tokens see those before them only; None asks the layer.
        **kwargs: More for torch's, such as a bias of positions.

    Returns:
        [texts, tokens, heads, dimensions], and no probabilities.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # rotated queries and keys come in float32; torch's kernel casts them, too
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    plain = (
        query.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and dropout == 0
        and not any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
        and not kwargs.get("output_attentions")
        and query.shape == key.shape
        and query.shape[:3] == value.shape[:3]
        and query.dtype == torch.bfloat16
        and not (attention_mask is None and causal)
    )
    spans = _spans(query, attention_mask) if plain else None
    if spans is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return result
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    out: Tensor = _Blocks.apply(scaled, key, value, spans)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


def _spans(query: Tensor, mask: Tensor | None) -> list[Span] | None:
    """First and last token (exclusive) of each text; None where the mask says more than that."""
    texts, _, tokens, _ = query.shape
    if mask is None:
        return [(0, tokens)] * texts
    known: tuple[Tensor, list[Span] | None] | None = getattr(_scratch, "known", None)
    if known is None or known[0] is not mask:  # every layer is given the same mask
        _scratch.known = known = (mask, _spans_of(mask, texts, tokens))
    return known[1]


def _spans_of(mask: Tensor, texts: int, tokens: int) -> list[Span] | None:
    if mask.dtype != torch.bool or mask.shape != (texts, 1, tokens, tokens) or bool((mask != mask[:, :, :1]).any()):
        return None
    seen = mask[:, 0, 0]
    starts = seen.int().argmax(dim=1)
    counts = seen.sum(dim=1)
    positions = torch.arange(tokens)
    whole = (positions >= starts[:, None]) & (positions < (starts + counts)[:, None])
    if bool((whole != seen).any()) or bool((counts == 0).any()):
        return None
    return [(int(start), int(start + count)) for start, count in zip(starts, counts, strict=True)]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def fast_attention(model: nn.Module) -> Iterator[int]:
    """Within it, those layers of a model that use torch's attention use `attention`.

    Args:
        model: Changed in place, and back at the end.

    Yields:
        How many of the model's configurations were changed; 0 where it has an attention of its own.
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]

    def put(ours: str) -> None:
        # parents before children, as modules come: what is set on a configuration is set on those in it, too
        for config, own in before:
            config._attn_implementation = ours if own == "sdpa" else own

    put(NAME)
    try:
        yield sum(own == "sdpa" for _, own in before)
    finally:
        put("sdpa")
        _scratch.__dict__.clear()
