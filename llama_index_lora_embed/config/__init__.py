"""Settings as small frozen objects: the only place where a default is written.

Importing this module imports nothing heavy.
"""

from llama_index_lora_embed.config.mining import MiningSettings
from llama_index_lora_embed.config.objective import FOR_PAIRS, IN_BATCH, OBJECTIVES, ObjectiveSettings
from llama_index_lora_embed.config.questions import NEAR_DUPLICATE, LLMSettings, QueryFilterSettings
from llama_index_lora_embed.config.training import TrainingSettings

__all__ = [
    "FOR_PAIRS",
    "IN_BATCH",
    "JOURNAL_NAME",
    "MANIFEST_NAME",
    "NEAR_DUPLICATE",
    "OBJECTIVES",
    "LLMSettings",
    "MiningSettings",
    "ObjectiveSettings",
    "QueryFilterSettings",
    "TrainingSettings",
]

MANIFEST_NAME = "finetune.json"
"""File beside the adapter that says how it was made (see `adapter.Manifest`)."""

JOURNAL_NAME = "finetune_questions.journal.jsonl"
"""File in the working directory in which an LLM's answers are kept, where no other is named."""
