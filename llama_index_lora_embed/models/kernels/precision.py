"""In which precision a model computes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

# 1.0 GB instead of 1.6 GB on tenk with MiniLM, in the same time; a chunk of 8 texts needs some 60 kernels at once
_KERNELS = 64


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Take "bf16" where asked for, or on "auto" where the hardware computes it natively; else "fp32".

    Emulated bfloat16 is slower than float32, so a processor must have AVX512-BF16 or AMX.
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


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Within it, torch computes in bfloat16 where that keeps what matters ("bf16"), or as it always does ("fp32")."""
    if precision != "bf16":
        return nullcontext()
    if device.type == "cpu":
        keep_few_kernels()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def keep_few_kernels() -> None:
    """Have torch keep the bfloat16 kernels of the last shapes only, instead of the last thousand.

    On a processor a kernel is made for each shape of a matrix product, and texts come in all lengths. oneDNN and torch
    each keep 1,024 of them, half a megabyte and more apiece. Both read their bound from the environment, once, when the
    first kernel is made: later calls change nothing, and what the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS))
