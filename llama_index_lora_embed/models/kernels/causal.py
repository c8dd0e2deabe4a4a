"""Causal attention without a mask, for texts whose padding comes last: no token sees those after it in any case.

A mask keeps torch from the half of the products that causal attention can leave out, and has it copy the keys and
values of decoders whose query heads share them. `cuda_graphs` uses it, and has the switch; delete it with that module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llama_index_lora_embed.models.kernels.attention import NAME
from llama_index_lora_embed.models.kernels.decoders import is_part

# transformers makes no mask for an attention that has none registered
_CAUSAL = "lora_embed_causal"


def is_causal(transformer: nn.Module, tokens: int | None) -> bool:
    """Whether every layer lets a token of a text of so many tokens see all earlier ones, and no later one."""
    config: Any = transformer.config
    attention = [module.is_causal for module in transformer.modules() if hasattr(module, "is_causal")]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        is_part(transformer, "Model")
        and config._attn_implementation in {"sdpa", NAME}
        and all(attention)
        and getattr(config, "is_causal", True) is not False
        and not getattr(config, "use_bidirectional_attention", False)
        and (window is None or (tokens is not None and tokens <= window))
    )


def moved_to_start(mask: Tensor) -> Tensor:
    """Which token of a text comes at each place, int [texts, tokens], so that padding comes last."""
    return mask.bool().logical_not().long().argsort(dim=1, stable=True)


@contextmanager
def causal_attention(config: Any) -> Iterator[None]:
    """Within it, attention of a model with this configuration is causal, and knows no padding."""
    before = config._attn_implementation
    config._attn_implementation = _CAUSAL
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    kept = {name: kwargs[name] for name in ("dropout", "scaling") if name in kwargs}
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kept)


AttentionInterface.register(_CAUSAL, _attention)
