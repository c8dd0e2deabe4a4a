"""Adapter directory to LlamaIndex embedding model."""

from llama_index_lora_embed.embedding.adapter_embedding import AdapterEmbeddingModel, LinearAdapterEmbeddingModel
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

__all__ = ["AdapterEmbeddingModel", "LinearAdapterEmbeddingModel", "LoraEmbedding"]
