"""After training on a base in 4 bits: the adapter on the base in full precision, which is what serves."""

from __future__ import annotations

import copy
from collections.abc import Callable

from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.lora import adapter_weights, restore_weights


def onto_full_precision(
    quantized: SentenceTransformer, selection: CheckpointSelection, load: Callable[[], SentenceTransformer]
) -> SentenceTransformer:
    """The trained adapter on the base in full precision; the base and the best are evaluated again there.

    Quantization changes the base's embeddings, and with them the metrics; the reported ones must be those of the model
    that serves. `load` loads the base in full precision.
    """
    model = load()
    model.max_seq_length = quantized.max_seq_length
    if selection.evaluator is not None:
        selection.installed = None
        selection.evaluate_installed(model)
        selection.base = selection.evaluate(model)
    config = copy.deepcopy(quantized.transformers_model.peft_config["default"])  # type: ignore[union-attr]
    model.add_adapter(config)
    restore_weights(model, adapter_weights(quantized))
    model.eval()
    if selection.evaluator is not None:
        selection.best = selection.evaluate(model)
    return model
