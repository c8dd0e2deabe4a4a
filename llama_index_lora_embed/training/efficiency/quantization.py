"""After training on a base in 4 bits: back to the base in full precision, which is what serves."""

from __future__ import annotations

import copy
from collections.abc import Callable

from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.lora import adapter_weights, restore_weights


def onto_full_precision(
    quantised: SentenceTransformer, best: CheckpointSelection, load: Callable[[], SentenceTransformer]
) -> SentenceTransformer:
    """The trained adapter on the base as it is stored, and the evaluations of the two there.

    What is reported has to be what is served: 4 bits change the base's vectors, and with them the measures of base
    and tuned.

    Args:
        quantised: The model that was trained, with its best weights.
        best: Its evaluations of base and best are made again.
        load: Loads the base in full precision.
    """
    model = load()
    model.max_seq_length = quantised.max_seq_length
    if best.evaluate is not None:
        best.base = best.judge(model)
    config = copy.deepcopy(quantised.transformers_model.peft_config["default"])  # type: ignore[union-attr]
    model.add_adapter(config)
    restore_weights(model, adapter_weights(quantised))
    model.eval()
    if best.evaluate is not None:
        best.best = best.judge(model)
    return model
