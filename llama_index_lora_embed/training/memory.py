"""`memory_mb`: what a training step on a CPU may keep, so that its process stays under a bound."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Literal

import torch

from llama_index_lora_embed.core.errors import warn_user
from llama_index_lora_embed.training.efficiency.gradcache import KeptActivations
from llama_index_lora_embed.training.objectives.collator import CHUNK_TOKENS
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from llama_index_lora_embed.training.objectives.plan import TrainingPlan

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_LIBRARIES = 700 << 20  # bytes of a process before a model is loaded, with a dataset of some megabytes
# bytes of a pass per token, layer and dimension of the hidden states: what it keeps, and what it works with at a time
_KEPT, _WORKING = 26, 800
_TIMES_WEIGHTS, _SHARE = 3, 8  # "auto" keeps as many bytes as the weights take, times 3, or 1/8 of the machine's


def bound_memory(model: SentenceTransformer, plan: TrainingPlan, memory_mb: int | Literal["auto"]) -> None:
    """Choose how large chunks are and how many keep their activations, where a CPU computes a step in chunks.

    The size of a chunk follows from the settings alone, because the last digits depend on it, and a resumed run must
    have the same; how many are kept, from what the process holds now as well.

    Args:
        model: With its LoRA and its length.
        plan: Its collator and loss are changed.
        memory_mb: See `TrainingSettings`.
    """
    loss, weights = plan.inputs["loss"], sum(parameter.nbytes for parameter in model.parameters())
    if model.device.type != "cpu" or not isinstance(loss, MaskedInfoNCELoss) or not loss.cached:
        return
    collator = plan.inputs["data_collator"]
    if memory_mb == "auto":
        limit = min(_TIMES_WEIGHTS * weights, _machine_bytes() // _SHARE)
    else:
        width, layers = _shape(model)
        room = (memory_mb << 20) - _LIBRARIES - weights
        collator.chunk_tokens = max(1, min(CHUNK_TOKENS, room // (width * (_KEPT * layers + _WORKING))))
        tokens = collator.chunk_tokens
        if collator.mini_batch_size is not None:
            tokens = collator.mini_batch_size * (model.max_seq_length or tokens)
        held = highest_memory_mb(model.device) or 0.0
        limit = int((memory_mb - held) * 2**20) - tokens * width * _WORKING
        if limit < 0:
            warn_user(
                f"memory_mb={memory_mb} is less than a training step needs beside the {held:.0f} MB that the process "
                "has held before. Raise it, or take a smaller base or a lower max_seq_length."
            )
    loss.kept = KeptActivations(model, max(0, limit))


def highest_memory_mb(device: torch.device) -> float | None:
    """Megabytes that were in use at most: on a CUDA device, or by this process; None where that is not known."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _machine_bytes() -> int:
    """Memory of this machine; 16 GB where that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 16 << 30


def _shape(model: SentenceTransformer) -> tuple[int, int]:
    """Width of the hidden states and number of layers, as far as the configuration says."""
    config: Any = getattr(model.transformers_model, "config", None)
    width, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    return int(width or model.get_embedding_dimension() or 768), int(layers or 12)
