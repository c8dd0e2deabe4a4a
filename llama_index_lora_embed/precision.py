"""In which precision a model computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


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
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
