"""Fused LoRA step: forward and backward pass of a LoRA layer as one autograd function of few, large operations.

peft computes W x + s B A x as separate operations. Each of them keeps an input for the backward pass, and under
autocast x is cast, and the cast kept, once for the base and once for A. Since W is frozen, one copy of x and the small
A x are enough; for a whole step that is at least a tenth less kept for the backward pass (the bound in its test).
Frozen weights are cast to bfloat16 once instead of in every forward pass. Switch: `TrainingSettings.fused_lora`. Delete
this module when a training run with `fused_lora=False` takes no more time and memory:
`python benchmarks/speed.py --contenders d --settings default pefts-lora`.
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

_ADAPTER = "default"


class _FrozenLinearWithLora(torch.autograd.Function):
    """y = W x + b + s B (A x), with gradients for x, A and B, in the dtype of x.

    With g = dy: dB = s gᵀ(A x), dA = s (g B)ᵀ x, dx = g W + s (g B) A. In float32 y = (W + s B A) x + b where there are
    so many tokens that adding B A to the weight takes less time than adding B (A x) to the output; in bfloat16 the sum
    would round the small change away.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.scale = scale
        ctx.merged = x.dtype == weight.dtype == torch.float32 and len(flat) * sum(weight.shape) >= 3 * weight.numel()
        if ctx.merged:
            y = F.linear(flat, torch.addmm(weight, up, down, alpha=scale), bias)
            ctx.save_for_backward(flat, weight, down, up)
        else:
            small = flat @ down.T.to(x.dtype)
            y = F.linear(flat, weight, bias)
            y.addmm_(small, up.T.to(x.dtype), alpha=scale)
            ctx.save_for_backward(flat, weight, down, up, small)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down, up, *rest = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        small = rest[0] if rest else flat @ down.T
        back = (g @ up.to(g.dtype)).mul_(ctx.scale)
        d_up = (small.T @ g).T.to(up.dtype).mul_(ctx.scale)
        d_down = (back.T @ flat).to(down.dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            if ctx.merged:
                d_x = g @ torch.addmm(weight, up, down, alpha=ctx.scale)
            else:
                d_x = g @ weight
                d_x.addmm_(back, down.to(g.dtype))
            d_x = d_x.view(*grad.shape[:-1], d_x.shape[-1])
        return d_x, None, None, d_down, d_up, None


class _LastCast:
    """The last tensor that was cast and its cast: query, key and value projections share their input."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.cast: Tensor | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        if self.source is not x or self.cast is None or self.cast.dtype != dtype:
            self.source, self.cast = x, x.to(dtype)
        return self.cast

    def clear(self) -> None:
        self.source = self.cast = None


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """Replace peft's forward of a model's LoRA layers by the fused step.

    Layers with DoRA, dropout, a LoRA bias, several adapters, hooks or a base other than `nn.Linear` (a quantised one,
    for example) keep peft's forward, and so does every forward pass in inference mode in float32.

    Args:
        model: A model with an adapter named "default"; it is changed in place and restored on exit.

    Yields:
        Number of layers changed.
    """
    last_cast = _LastCast()
    changed = {m: _FrozenLinear(m.get_base_layer()) for m in model.modules() if type(m) is LoraLinear and _is_plain(m)}
    for layer, frozen in changed.items():
        layer.forward = types.MethodType(_forward_of(layer, last_cast, frozen), layer)  # type: ignore[method-assign]
    try:
        yield len(changed)
    finally:
        for layer, frozen in changed.items():
            del layer.forward
            frozen.restore()
        last_cast.clear()


def _is_plain(layer: LoraLinear) -> bool:
    base = layer.get_base_layer()
    return (
        type(base) is nn.Linear
        and "forward" not in layer.__dict__  # accelerate sets one
        and list(layer.active_adapters) == [_ADAPTER]
        and not layer.lora_variant
        and not layer.merged_adapters
        and isinstance(layer.lora_dropout[_ADAPTER], nn.Identity)
        and layer.lora_B[_ADAPTER].bias is None
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


class _FrozenLinear:
    """Weight and bias of a frozen linear layer in the dtype of a training step.

    If that dtype holds the weight exactly, as bfloat16 does for a base that was stored in it, the layer's own weight is
    held in that dtype until `restore`: 2 bytes per weight instead of 6.
    """

    def __init__(self, linear: Any) -> None:
        self.linear = linear
        self.dtype = linear.weight.dtype
        self.casts: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}
        self.biases: dict[torch.dtype, Tensor | None] = {}  # kept in `restore`, because a recorded pass reads them

    def in_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, cast once per dtype."""
        if dtype not in self.casts:
            weight, bias = self.linear.weight, self.linear.bias
            with torch.inference_mode(False):  # the first forward pass may be an evaluation's
                cast = weight.detach().to(dtype)
                if dtype not in self.biases:
                    self.biases[dtype] = None if bias is None else bias.detach().to(dtype)
                self.casts[dtype] = (cast, self.biases[dtype])
                if dtype != weight.dtype and torch.equal(cast.to(weight.dtype), weight.detach()):
                    weight.data = cast
        return self.casts[dtype]

    def restore(self) -> None:
        """Restore the layer's own dtype."""
        if self.linear.weight.dtype != self.dtype:
            self.casts.clear()
            with torch.inference_mode(False):
                self.linear.weight.data = self.linear.weight.detach().to(self.dtype)


def _forward_of(layer: LoraLinear, last_cast: _LastCast, frozen: _FrozenLinear) -> Any:
    original = type(layer).forward

    def forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        down: Any = self.lora_A[_ADAPTER].weight
        up: Any = self.lora_B[_ADAPTER].weight
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        # the first pass of a chunk, without gradients, must give the same digits as the second
        training = torch.is_grad_enabled() or not torch.is_inference_mode_enabled()
        fused = (training or autocast) and down.requires_grad and not (args or kwargs)
        if not fused or self.disable_adapters or self.merged or list(self.active_adapters) != [_ADAPTER]:
            if not autocast:
                frozen.restore()
            result: Tensor = original(self, x, *args, **kwargs)
            return result
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        weight, bias = frozen.in_dtype(dtype)
        y: Tensor = _FrozenLinearWithLora.apply(last_cast(x, dtype), weight, bias, down, up, self.scaling[_ADAPTER])  # type: ignore[no-untyped-call]
        return y

    return forward
