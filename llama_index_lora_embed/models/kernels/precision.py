"""bfloat16 autocast where the hardware computes it natively, with a bound on the kernels that oneDNN and torch keep.

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
from contextlib import AbstractContextManager, nullcontext

import torch

# A chunk of 8 texts needs about 60 kernels at a time.
_MAX_KERNELS = 64


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Resolve "auto" to "bf16" if the device computes bfloat16 natively, else to "fp32".

    Emulated bfloat16 is slower than float32, so a CPU needs AVX512-BF16 or AMX.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    else:
        native = False
    return "bf16" if native else "fp32"


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
