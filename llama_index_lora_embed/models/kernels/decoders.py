"""Fused operations of decoders: RMSNorm, rotary embedding and gated MLP read and write a GPU's memory fewer times.

In transformers each is a chain of small operations in Python, and on a GPU they take longer than the matrix products of
a step: with Qwen3's 0.6 B parameters 320 ms of kernels became 172 ms (benchmarks/README.md, "Speed"). RMSNorm is
torch's own; the other two are Liger Kernel's, where it is installed (extra `gpu`). Training passes alone use them.
Switch: `TrainingSettings.fused_decoder`. Delete this module when transformers fuses these operations in training.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Families of transformers' decoders whose layers are computed like Llama's."""
_ROPE = "apply_rotary_pos_emb"
_LOCK = threading.Lock()
_training = 0  # models in training, in all threads: autograd computes layers again in threads of its own


@contextmanager
def fused_decoder(model: nn.Module) -> Iterator[int]:
    """Replace the operations of a model's layers while it is trained.

    Args:
        model: Its modules are changed in place, and restored on exit.

    Yields:
        Number of modules changed; 0 on a processor, and for models of other families.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    replaced = {m: new for m in model.modules() if on_gpu and "forward" not in m.__dict__ and (new := _fused(m))}
    for module, forward in replaced.items():
        module.forward = types.MethodType(forward, module)
    _count(on_gpu)
    try:
        yield len(replaced)
    finally:
        _count(-on_gpu)
        for module in replaced:
            del module.forward


def is_part(module: nn.Module, part: str) -> bool:
    """Whether a module is this part of a decoder of transformers itself: "Model", "Attention", "MLP" or "RMSNorm"."""
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in {f"{f}{part}" for f in FAMILIES}


def _count(change: int) -> None:
    global _training
    with _LOCK:
        _training += change


def _fused(module: nn.Module) -> Callable[..., Any] | None:
    """The forward pass to use instead of a module's own, or None."""
    if is_part(module, "RMSNorm"):
        return _norm
    if is_part(module, "Attention"):
        _fuse_rotary_embedding(sys.modules[type(module).__module__])
    if is_part(module, "MLP") and module.config.hidden_act == "silu" and _liger() is not None:  # type: ignore[union-attr]
        return _mlp
    return None


@cache
def _liger() -> tuple[Any, Any] | None:
    """Liger Kernel's rotary embedding and silu(a) · b, as autograd functions; None where it is not installed."""
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerRopeFunction, LigerSiLUMulFunction


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    if torch.is_inference_mode_enabled():
        result: Tensor = type(self).forward(self, hidden_states)
        return result
    weight = self.weight.to(hidden_states.dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):  # which would return float32; sums are in any case
        return F.rms_norm(hidden_states, (hidden_states.shape[-1],), weight, self.variance_epsilon)


def _mlp(self: Any, x: Tensor) -> Tensor:
    liger = _liger()
    if liger is None or torch.is_inference_mode_enabled():
        result: Tensor = type(self).forward(self, x)
    else:
        result = self.down_proj(liger[1].apply(self.gate_proj(x), self.up_proj(x)))
    return result


def _fuse_rotary_embedding(modeling: types.ModuleType) -> None:
    """Replace the function of a module of transformers by one that is Liger's in training passes on a GPU.

    It stays replaced, because another thread may train at the same time.
    """
    own, liger = getattr(modeling, _ROPE), _liger()
    if liger is None or getattr(own, "is_fused", False):
        return
    fused = liger[0].apply

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        training = _training and q.is_cuda and not torch.is_inference_mode_enabled()
        result: tuple[Tensor, Tensor] = (fused if training else own)(q, k, cos, sin, *args, **kwargs)
        return result

    rotate.is_fused = True  # type: ignore[attr-defined]
    setattr(modeling, _ROPE, rotate)
