"""A LoRA layer's step in few, large operations: what peft computes, in less time and memory.

peft computes W x + s B A x from parts. Each keeps an input for the backward pass, and under autocast casts of x are
made and kept for the base and for A. With W frozen, one copy of x and the small A x are enough.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

_NAME = "default"


class _FrozenLinearWithLora(torch.autograd.Function):
    """y = W x + b + s B (A x), with gradients for x, A and B, in the dtype of x.

    With g = dy: dB = s gᵀ(A x), dA = s (g B)ᵀ x, dx = g W + s (g B) A.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        small = flat @ down.T.to(x.dtype)
        y = F.linear(flat, weight, bias)
        y.addmm_(small, up.T.to(x.dtype), alpha=scale)
        ctx.save_for_backward(flat, small, weight, down, up)
        ctx.scale = scale
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, small, weight, down, up = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        back = (g @ up.to(g.dtype)).mul_(ctx.scale)
        d_up = (g.T @ small).to(up.dtype).mul_(ctx.scale)
        d_down = (back.T @ flat).to(down.dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = g @ weight
            d_x.addmm_(back, down.to(g.dtype))
            d_x = d_x.view(*grad.shape[:-1], d_x.shape[-1])
        return d_x, None, None, d_down, d_up, None


class _Casts:
    """The last tensor that was cast, and its cast: query, key and value projections share their input."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.cast: Tensor | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        if self.source is not x or self.cast is None or self.cast.dtype != dtype:
            self.source, self.cast = x, x.to(dtype)
        return self.cast

    def forget(self) -> None:
        self.source = self.cast = None


@contextmanager
def fast_lora(model: nn.Module) -> Iterator[int]:
    """Within it, a model's plain LoRA layers compute their training steps in few operations.

    Layers with something special (DoRA, dropout, a bias of their own, quantised or otherwise not a plain linear base,
    several adapters) keep peft's forward, and so does every forward without gradients in float32. Frozen weights are
    held in the autocast dtype, instead of being cast in every forward pass.

    Args:
        model: With an adapter named "default"; changed in place, and back at the end.

    Yields:
        How many layers were changed.
    """
    casts = _Casts()
    changed = {m: _Frozen(m.get_base_layer()) for m in model.modules() if type(m) is LoraLinear and _is_plain(m)}
    for layer, frozen in changed.items():
        layer.forward = types.MethodType(_forward_of(layer, casts, frozen), layer)  # type: ignore[method-assign]
    try:
        yield len(changed)
    finally:
        for layer, frozen in changed.items():
            del layer.forward
            frozen.restore()
        casts.forget()


def _is_plain(layer: LoraLinear) -> bool:
    base = layer.get_base_layer()
    return (
        type(base) is nn.Linear
        and "forward" not in layer.__dict__  # accelerate puts its own there
        and list(layer.active_adapters) == [_NAME]
        and not layer.lora_variant
        and not layer.merged_adapters
        and isinstance(layer.lora_dropout[_NAME], nn.Identity)
        and layer.lora_B[_NAME].bias is None
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


class _Frozen:
    """Weight and bias of a frozen linear layer, in the dtype that a step computes in.

    Where that dtype holds the weight exactly, as bfloat16 does for a base that was stored in it, the layer itself keeps
    it in that dtype meanwhile: one copy of two bytes instead of two copies of six.
    """

    def __init__(self, linear: Any) -> None:
        self.linear = linear
        self.own = linear.weight.dtype
        self.held: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def in_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in a dtype, cast once."""
        if dtype not in self.held:
            weight, bias = self.linear.weight, self.linear.bias
            with torch.inference_mode(False):  # an evaluation may come first
                cast = weight.detach().to(dtype)
                self.held[dtype] = (cast, None if bias is None else bias.detach().to(dtype))
                if dtype != weight.dtype and torch.equal(cast.to(weight.dtype), weight.detach()):
                    weight.data = cast
        return self.held[dtype]

    def restore(self) -> None:
        """Give the layer its own dtype back."""
        if self.linear.weight.dtype != self.own:
            self.held.clear()
            with torch.inference_mode(False):
                self.linear.weight.data = self.linear.weight.detach().to(self.own)


def _forward_of(layer: LoraLinear, casts: _Casts, frozen: _Frozen) -> Any:
    original = type(layer).forward

    def forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        down: Any = self.lora_A[_NAME].weight
        up: Any = self.lora_B[_NAME].weight
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        ours = (torch.is_grad_enabled() or autocast) and down.requires_grad and not (args or kwargs)
        if not ours or self.disable_adapters or self.merged or list(self.active_adapters) != [_NAME]:
            if not autocast:
                frozen.restore()
            result: Tensor = original(self, x, *args, **kwargs)
            return result
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        weight, bias = frozen.in_dtype(dtype)
        y: Tensor = _FrozenLinearWithLora.apply(casts(x, dtype), weight, bias, down, up, self.scaling[_NAME])  # type: ignore[no-untyped-call]
        return y

    return forward
