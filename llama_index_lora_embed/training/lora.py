"""The LoRA that is trained: put on a base, in float32, everything else frozen."""

from __future__ import annotations

import copy

from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.errors import ConfigError
from llama_index_lora_embed.presets import lora_target_modules


def add_lora(model: SentenceTransformer, lora_config: LoraConfig | None, settings: TrainingSettings) -> None:
    """Add a trainable LoRA named "default" to a model, in place, and freeze everything else.

    Args:
        model: Loaded base.
        lora_config: peft's own; None adapts all linear layers at the settings' rank. It is not changed.
        settings: Rank and alpha of the default LoRA.

    Raises:
        ConfigError: The configuration does not fit the base.
    """
    if lora_config is None:
        lora_config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=0.0,
            target_modules=lora_target_modules(model),
        )
    else:
        lora_config = copy.deepcopy(lora_config)  # add_adapter writes the base's place into it
        if lora_config.target_modules is None:
            lora_config.target_modules = lora_target_modules(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # peft freezes the transformer only; a Dense head is not in the adapter
    try:
        model.add_adapter(lora_config)
    except ValueError as error:
        raise ConfigError(
            f"a lora_config that does not fit the base ({error})",
            "target_modules that exist in it",
            f"This base has: {', '.join(lora_target_modules(model))}.",
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
