"""`FinetuneConfig` and the small models it is made of: every default, check and description is written here, once.

Importing this module imports nothing heavy.
"""

from llama_index_lora_embed.config.base import Settings
from llama_index_lora_embed.config.embedding_adapter import EmbeddingAdapterSettings
from llama_index_lora_embed.config.finetune import (
    DEFAULT_BASE,
    POOLING_MODES,
    PRESETS,
    SHORTEST_WINDOW,
    BaseModelSettings,
    DataSettings,
    FinetuneConfig,
    OutputSettings,
    Preset,
)
from llama_index_lora_embed.config.mining import MiningSettings
from llama_index_lora_embed.config.objective import DISTILLED, FOR_PAIRS, IN_BATCH, OBJECTIVES, ObjectiveSettings
from llama_index_lora_embed.config.questions import (
    NEAR_DUPLICATE,
    LLMSettings,
    QueryFilterSettings,
    QueryGeneratorSettings,
)
from llama_index_lora_embed.config.training import TrainingSettings

__all__ = [
    "DEFAULT_BASE",
    "DISTILLED",
    "FOR_PAIRS",
    "IN_BATCH",
    "JOURNAL_NAME",
    "LOCK_NAME",
    "MANIFEST_NAME",
    "NEAR_DUPLICATE",
    "OBJECTIVES",
    "POOLING_MODES",
    "PRESETS",
    "SHORTEST_WINDOW",
    "STAMP_ID",
    "VERSIONS_NAME",
    "BaseModelSettings",
    "DataSettings",
    "EmbeddingAdapterSettings",
    "FinetuneConfig",
    "LLMSettings",
    "MiningSettings",
    "ObjectiveSettings",
    "OutputSettings",
    "Preset",
    "QueryFilterSettings",
    "QueryGeneratorSettings",
    "Settings",
    "TrainingSettings",
]

MANIFEST_NAME = "finetune.json"
"""File beside the adapter that says how it was made (see `models.adapter_directory.Manifest`)."""

LOCK_NAME = "lock"
"""File in a run directory that the training process holds locked."""

VERSIONS_NAME = "versions.jsonl"
"""File in a registry that lists its versions."""

JOURNAL_NAME = "finetune_questions.journal.jsonl"
"""File in the working directory that holds an LLM's answers where no other is named."""

STAMP_ID = "94cc0c64-714d-51f6-8156-76aa79898940"
"""Id of the entry with an index's stamp, in stores that have no other place for it; a UUID, because some stores accept
no other ids."""
