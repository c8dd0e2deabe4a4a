"""Packing: the layers of an encoder compute the tokens of all texts in one row, without padding.

A chunk of texts is as long as its longest; on tenk_train a quarter of all tokens are padding, for which linear layers,
GELU and layer norms take as long as for others. Here the first layer gets one row with the tokens of all texts, and
after the last layer they return to their places; attention (`attention`) is computed text by text. Layers that use
positions or have more inputs than hidden states and a padding mask are left as they are. Switch:
`TrainingSettings.fused_attention`. Delete this module when sentence-transformers unpads without flash attention 2.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Span = tuple[int, int]  # first and last token (exclusive) of a text
_thread = threading.local()
# inputs of a layer that do not depend on where a token is in its row
_PLAIN = {"attention_mask", "output_attentions", "output_hidden_states", "return_dict"}


class Packed:
    """The texts of a forward pass that are packed: spans [texts] of the packed row, and the places of its tokens."""

    def __init__(self, mask: Tensor, spans: list[Span]) -> None:
        self.mask = mask
        self.spans = spans
        self.tokens = spans[-1][1]

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor [rows, tokens, ...] is packed."""
        return x.shape[:2] == (1, self.tokens)


def packed_spans(query: Tensor) -> list[Span] | None:
    """Spans of the texts if queries [1, heads, tokens, dimensions] are those of a packed row, else None."""
    packed: Packed | None = getattr(_thread, "packed", None)
    if packed is None or (query.shape[0], query.shape[2]) != (1, packed.tokens):
        return None
    return packed.spans


@contextmanager
def packed_layers(model: nn.Module) -> Iterator[int]:
    """Have the layers of a model on a CPU compute without padding.

    Args:
        model: Its attention must be `attention`, within `blocked_attention`.

    Yields:
        Number of stacks of layers that do; 0 if the model has none that can.
    """
    stacks = [stack for stack in map(_stack, model.modules()) if stack is not None]
    handles = []
    for first, last in stacks:
        handles.append(first.register_forward_pre_hook(_pack, with_kwargs=True))
        handles.append(last.register_forward_hook(_unpack))
    try:
        yield len(stacks)
    finally:
        for handle in handles:
            handle.remove()
        _thread.__dict__.clear()


def _stack(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """First and last layer of an encoder whose layers are like BERT's: they know no positions and no other layers."""
    layers = getattr(module, "layer", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    config: Any = getattr(module, "config", None)
    if getattr(config, "is_decoder", False) or getattr(config, "_attn_implementation", None) is None:
        return None
    names = {type(layer).__name__ for layer in layers}
    return (layers[0], layers[-1]) if names <= _LAYERS else None


# their attention is computed by transformers' `AttentionInterface`, from hidden states and padding mask alone
_LAYERS = {"BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer"}


def _pack(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    _thread.packed = None
    if torch.is_inference_mode_enabled():  # an evaluation, whose texts have nearly the same length
        return None
    states = args[0] if args else kwargs.get("hidden_states")
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    given = [*args[2:], *(value for name, value in kwargs.items() if name not in {*_PLAIN, "hidden_states"})]
    if not isinstance(states, Tensor) or states.device.type != "cpu" or any(value is not None for value in given):
        return None
    seen = _tokens(states, mask)
    if seen is None:
        return None
    ends = seen.sum(dim=1).cumsum(dim=0).tolist()
    _thread.packed = Packed(seen, list(zip([0, *ends[:-1]], ends, strict=True)))
    packed = states[seen][None]
    return ((packed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": packed})


def _tokens(states: Tensor, mask: Any) -> Tensor | None:
    """Which tokens are no padding, bool [texts, tokens]; None if the mask is not a plain padding mask."""
    texts, tokens = states.shape[:2]
    if mask is None:
        return torch.ones(texts, tokens, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (texts, 1, tokens, tokens):
        return None
    if bool((mask != mask[:, :, :1]).any()):
        return None
    seen = mask[:, 0, 0]
    return seen if bool(seen.any(dim=1).all()) else None


def _unpack(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    packed: Packed | None = getattr(_thread, "packed", None)
    _thread.packed = None
    states = output[0] if isinstance(output, tuple) else output
    if packed is None or not packed.holds(states):
        return None
    padded = states.new_zeros(*packed.mask.shape, states.shape[-1])
    padded[packed.mask] = states[0]
    return (padded, *output[1:]) if isinstance(output, tuple) else padded
