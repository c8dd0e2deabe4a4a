"""The kernels of a training step, as the settings switch them on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.models.kernels.attention import blocked_attention
from llama_index_lora_embed.models.kernels.cuda_graphs import cuda_graphs
from llama_index_lora_embed.models.kernels.decoders import fused_decoder
from llama_index_lora_embed.models.kernels.lora import fused_lora
from llama_index_lora_embed.models.kernels.packing import packed_layers


@contextmanager
def training_kernels(
    model: SentenceTransformer, settings: TrainingSettings, *, recomputes: bool = False, processes: int = 1
) -> Iterator[None]:
    """Replace what a model with a LoRA computes in training; afterwards it is as before.

    Args:
        model: Changed in place.
        settings: Its switches.
        recomputes: Whether layers are computed again outside of their pass (gradient checkpointing).
        processes: That train together.
    """
    with ExitStack() as stack:
        if settings.fused_lora:
            stack.enter_context(fused_lora(model))
        if settings.fused_attention:
            stack.enter_context(blocked_attention(model))
            if not recomputes and model.device.type == "cpu":  # its hooks would keep passes from being recorded
                stack.enter_context(packed_layers(model))
        if settings.fused_decoder:
            stack.enter_context(fused_decoder(model))
        if settings.cuda_graphs and not recomputes and processes == 1:
            stack.enter_context(cuda_graphs(model))
        yield
