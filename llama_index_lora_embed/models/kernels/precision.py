"""bfloat16 autocast where the hardware computes it faster, with a bound on the kernels that oneDNN and torch keep.

Training steps and the evaluations between them run under autocast, with weights in float32; embedding stays in float32,
because bfloat16 moves too many of the ten nearest passages (benchmarks/README.md, "Embedding"). On CPUs, oneDNN and
torch each keep a kernel for up to 1,024 shapes of a matrix product, and texts come in all lengths: with 64 a training
step takes the same time, at a peak of 2,559 MB instead of 3,132 MB (benchmarks/README.md, "Memory of a training step").
Switch: `TrainingSettings.precision`, "fp32" for float32; the bounds are environment variables, which win if the user
has set them (`python benchmarks/speed.py --contenders d --settings default fp32`). Delete `limit_kernel_caches` when a
training run without it takes no more memory; the rest stays as long as supported hardware emulates bfloat16.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

# A chunk of 8 texts needs about 60 kernels at a time.
_MAX_KERNELS = 64
_SMALL = (1536, 384)  # the largest layers of all-MiniLM-L6-v2
_ROWS, _REPEATS = 512, 4  # less than 0.2 s for layers of 4096 x 1024
_CHOSEN: dict[tuple[int, int], str] = {}  # what "auto" means on the CPU, by size of the largest layer


def resolve_precision(wanted: str, device: torch.device, model: nn.Module | None = None) -> str:
    """Resolve "auto" to "bf16" where the device computes it natively and not slower than float32, else to "fp32".

    A processor can have instructions for bfloat16 that are slower than those for float32: on an Intel Xeon with
    AVX512-BF16 and without AMX a product takes 1.8 times as long, and a training step 1.5 times (benchmarks/README.md,
    "Speed"). On CPUs, therefore, products of the largest linear layer's size are timed, once per process and size;
    `settle_precision` decides it without.

    Args:
        wanted: "auto", "bf16" or "fp32".
        device: Of the model.
        model: Whose layers are timed; None for those of a small model.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not (known.get("avx512_bf16") or known.get("amx_bf16")):  # emulated bfloat16 is slower
        return "fp32"
    size = _largest(model)
    if size not in _CHOSEN:
        limit_kernel_caches()
        _CHOSEN[size] = "bf16" if _seconds(size, torch.bfloat16) < _seconds(size, torch.float32) else "fp32"
    return _CHOSEN[size]


def settle_precision(precision: str, model: nn.Module) -> None:
    """Have "auto" mean this precision for a model on a CPU: that of the run that is resumed, or of other processes."""
    _CHOSEN[_largest(model)] = precision


def _largest(model: nn.Module | None) -> tuple[int, int]:
    """Outputs and inputs of a model's largest linear layer; of a small model's at least, whose time can be told."""
    layers = [] if model is None else [module for module in model.modules() if isinstance(module, nn.Linear)]
    sizes = [_SMALL, *((layer.out_features, layer.in_features) for layer in layers)]
    return max(sizes, key=lambda size: size[0] * size[1])


def _seconds(size: tuple[int, int], dtype: torch.dtype) -> float:
    """Shortest time of a layer's products in a training step: of the forward pass and of the gradient of its input."""
    generator = torch.Generator().manual_seed(0)
    weight, x, gradient = (
        torch.randn(shape, generator=generator).to(dtype) for shape in (size, (_ROWS, size[1]), (_ROWS, size[0]))
    )
    taken = []
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for _ in range(_REPEATS):  # the first compiles kernels, and others may be disturbed by other programs
            started = time.perf_counter()
            nn.functional.linear(x, weight)
            gradient @ weight
            taken.append(time.perf_counter() - started)
    return min(taken)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Bfloat16 autocast for "bf16", no change for "fp32"."""
    if precision != "bf16":
        return nullcontext()
    if device.type == "cpu":
        limit_kernel_caches()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def limit_kernel_caches() -> None:
    """Bound the kernel caches of oneDNN and torch, unless the user has set their environment variables.

    Both read the variable once, when the first kernel is compiled; calls after that have no effect.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_MAX_KERNELS))
