"""The front desk: an engine takes a dataset or nodes and returns a fine-tuned embedding model."""

from llama_index_lora_embed.engines.lora import LoraFinetuneEngine
from llama_index_lora_embed.engines.result import FinetuneResult

SentenceTransformersFinetuneEngine = LoraFinetuneEngine
"""llama-index-finetuning's name for the engine, so that old code changes its import line and nothing else."""

__all__ = ["FinetuneResult", "LoraFinetuneEngine", "SentenceTransformersFinetuneEngine"]
