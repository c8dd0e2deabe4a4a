"""The front desk: `run_finetune(config)`, and the engine that turns llama-index-finetuning's arguments into one."""

from llama_index_lora_embed.engines.lora import LoraFinetuneEngine
from llama_index_lora_embed.engines.result import FinetuneResult
from llama_index_lora_embed.engines.run import run_finetune
from llama_index_lora_embed.engines.run_verdict import BaseChange

SentenceTransformersFinetuneEngine = LoraFinetuneEngine
"""llama-index-finetuning's name for the engine, so that old code changes its import line and nothing else."""

__all__ = ["BaseChange", "FinetuneResult", "LoraFinetuneEngine", "SentenceTransformersFinetuneEngine", "run_finetune"]
