"""The front desk: `run_finetune(config)`, and the engines that take llama-index-finetuning's arguments."""

from llama_index_lora_embed.engines.embedding_adapter import EmbeddingAdapterFinetuneEngine
from llama_index_lora_embed.engines.embedding_adapter_result import EmbeddingAdapterResult
from llama_index_lora_embed.engines.lora import LoraFinetuneEngine
from llama_index_lora_embed.engines.result import FinetuneResult
from llama_index_lora_embed.engines.run import run_finetune
from llama_index_lora_embed.engines.run_verdict import BaseChange

SentenceTransformersFinetuneEngine = LoraFinetuneEngine
"""llama-index-finetuning's name for the engine, so that old code changes its import line and nothing else."""

__all__ = [
    "BaseChange",
    "EmbeddingAdapterFinetuneEngine",
    "EmbeddingAdapterResult",
    "FinetuneResult",
    "LoraFinetuneEngine",
    "SentenceTransformersFinetuneEngine",
    "run_finetune",
]
