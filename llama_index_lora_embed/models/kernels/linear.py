"""Linear layers on x86 processors without gradients: oneDNN on weights in its own order, not torch's own product.

torch multiplies float32 matrices with MKL, which on processors of other makers than Intel takes less than half of what
they can do: on an AMD EPYC a layer of MiniLM takes 2.2 to 2.9 times as long with it as with oneDNN and weights that
are ordered once (1 thread, 7 to 2,048 rows). It is float32 either way, and differs in the last digits. What GELU makes
of a layer's output replaces it: fresh memory for a model's largest tensors costs more than the function itself.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from llama_index_lora_embed.models.kernels.precision import keep_few_kernels

_MOST_BYTES = 1 << 29  # of a model's linear weights, which are in memory twice then
_THIN = 32  # in or out, as a LoRA's products have: those take as long with oneDNN, or longer
_TOLERANCE = 1e-5  # of the largest value; what the order of a float32 sum makes
# by layer: (address and version of the weight that was ordered, the ordered one)
_ORDERED: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


@contextmanager
def fast_linear(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, those of the modules that are linear layers take oneDNN's product where that can be had and is right.

    Weights are ordered at the first call, and again when they have changed. Models on accelerators, in other
    precisions, and those of more than half a gigabyte stay as they are.

    Args:
        modules: Of a model that computes in inference mode.
    """
    modules = list(modules)
    layers = [layer for layer in modules if isinstance(layer, nn.Linear) and _can_be(layer)]
    gelus = [module for module in modules if _can_be_in_place(module)]
    if not layers or sum(layer.weight.nbytes for layer in layers) > _MOST_BYTES or not _is_right():
        yield
        return
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(_product, layer)  # torch's own way of setting takes long
        for gelu in gelus:
            gelu.__dict__["forward"] = _gelu
        yield
    finally:
        for module in [*layers, *gelus]:
            module.__dict__.pop("forward", None)


def _can_be(layer: nn.Linear) -> bool:
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    if min(weight.shape) < _THIN:
        return False
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.is_inference()


def _can_be_in_place(module: nn.Module) -> bool:
    plain = type(module) is GELUActivation and module.act is nn.functional.gelu
    return plain and "forward" not in module.__dict__


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not x.numel():
        return nn.functional.linear(x, layer.weight, layer.bias)
    key = layer.weight.data_ptr(), layer.weight._version
    known = _ORDERED.get(layer)
    if known is None or known[0] != key:
        known = _ORDERED[layer] = key, _order(layer.weight)
    return _multiply(x, known[1], layer.bias)


def _gelu(x: Tensor) -> Tensor:
    """In place; its input is a layer's output, which nothing else reads."""
    if torch.is_grad_enabled():
        return nn.functional.gelu(x)
    made: Tensor = torch.ops.aten.gelu_(x)
    return made


def _order(weight: Tensor) -> Tensor:
    ordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return ordered


def _multiply(x: Tensor, ordered: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")
    return product


@cache
def _is_right() -> bool:
    """Whether torch has the operations, which its compiler uses, and they give what its own product gives."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch._C._has_mkldnn:
        return False
    keep_few_kernels()
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((96, 64), (96,), (2, 5, 64)))
    try:
        with torch.inference_mode():
            found, expected = _multiply(x, _order(weight), bias), nn.functional.linear(x, weight, bias)
            without = _multiply(x, _order(weight), None), nn.functional.linear(x, weight)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):  # another release of torch, another build
        return False
    return _agree(found, expected) and _agree(*without)


def _agree(found: Any, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
