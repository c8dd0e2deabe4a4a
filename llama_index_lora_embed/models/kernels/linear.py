"""oneDNN's float32 matrix product in the linear layers of a model that embeds, on x86 CPUs.

torch multiplies float32 matrices with MKL, which leaves more than half of an AMD CPU idle: a linear layer of MiniLM
takes 2.2 to 2.9 times as long with it as with oneDNN on weights that were reordered once (AMD EPYC, 1 thread, 7 to
2,048 rows). The results are float32 too and differ in the last digits. With `parallel` it embeds texts of equal length
2.0 to 2.4 times as fast as `HuggingFaceEmbedding`, without both 1.5 to 1.8 times (benchmarks/README.md, "Embedding").
GELU runs in place, which saves an allocation of a model's largest tensors. The two torch operations are private to its
compiler, so their results are compared with torch's own product before they are used. Switch:
`torch.backends.mkldnn.enabled = False`, torch's own for oneDNN. Delete this module when
`python benchmarks/throughput.py` is as fast with that switch off, for example because torch takes oneDNN itself on AMD
CPUs.
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

from llama_index_lora_embed.models.kernels.precision import limit_kernel_caches

# Models with larger linear weights stay as they are, because the reordered weights are a second copy in memory.
_MAX_BYTES = 1 << 29
# Products with fewer input or output features, such as a LoRA's, are no faster with oneDNN.
_MIN_FEATURES = 32
_TOLERANCE = 1e-5  # relative to the largest value; float32 sums in another order
# Key of the weight (address and version) and the reordered weight, by layer.
_REORDERED: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


@contextmanager
def onednn_linear(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Replace the product of float32 linear layers on an x86 CPU by oneDNN's, and make their GELU work in place.

    Weights are reordered at a layer's first product, and again after they have changed. Nothing is replaced if oneDNN
    is missing or switched off, or if the linear weights are larger than half a gigabyte.

    Args:
        modules: All modules of a model, which is used in inference mode.
    """
    modules = list(modules)
    layers = [layer for layer in modules if isinstance(layer, nn.Linear) and _is_supported(layer)]
    gelus = [module for module in modules if _is_plain_gelu(module)]
    if not layers or sum(layer.weight.nbytes for layer in layers) > _MAX_BYTES or not _is_available():
        yield
        return
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(_linear, layer)  # nn.Module.__setattr__ is slow
        for gelu in gelus:
            gelu.__dict__["forward"] = _gelu
        yield
    finally:
        for module in [*layers, *gelus]:
            module.__dict__.pop("forward", None)


def _is_supported(layer: nn.Linear) -> bool:
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    if min(weight.shape) < _MIN_FEATURES:
        return False
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.is_inference()


def _is_plain_gelu(module: nn.Module) -> bool:
    plain = type(module) is GELUActivation and module.act is nn.functional.gelu
    return plain and "forward" not in module.__dict__


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not x.numel():
        return nn.functional.linear(x, layer.weight, layer.bias)
    key = layer.weight.data_ptr(), layer.weight._version
    cached = _REORDERED.get(layer)
    if cached is None or cached[0] != key:
        cached = _REORDERED[layer] = key, _reorder(layer.weight)
    return _multiply(x, cached[1], layer.bias)


def _gelu(x: Tensor) -> Tensor:
    """GELU in place: its input is a linear layer's output, which nothing else reads."""
    if torch.is_grad_enabled():
        return nn.functional.gelu(x)
    result: Tensor = torch.ops.aten.gelu_(x)
    return result


def _reorder(weight: Tensor) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return reordered


def _multiply(x: Tensor, reordered: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")
    return product


def _is_available() -> bool:
    return bool(torch.backends.mkldnn.enabled) and _agrees_with_torch()


@cache
def _agrees_with_torch() -> bool:
    """Whether this build of torch has the operations and they give the same result as its own product."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch._C._has_mkldnn:
        return False
    limit_kernel_caches()
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((96, 64), (96,), (2, 5, 64)))
    try:
        with torch.inference_mode():
            product, expected = _multiply(x, _reorder(weight), bias), nn.functional.linear(x, weight, bias)
            without_bias = _multiply(x, _reorder(weight), None), nn.functional.linear(x, weight)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):  # another release or build of torch
        return False
    return _is_close(product, expected) and _is_close(*without_bias)


def _is_close(product: Any, expected: Tensor) -> bool:
    largest = expected.abs().max()
    return product.shape == expected.shape and bool((product - expected).abs().max() <= _TOLERANCE * largest)
