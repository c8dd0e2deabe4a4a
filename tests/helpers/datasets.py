"""Datasets made from others."""

from __future__ import annotations

from llama_index_lora_embed import EmbeddingQAFinetuneDataset


def asked_differently(dataset: EmbeddingQAFinetuneDataset) -> EmbeddingQAFinetuneDataset:
    """The same passages and ids with the words of each query in reverse order, so that no query is the same."""
    queries = {i: " ".join(reversed(text.split())) for i, text in dataset.queries.items()}
    return dataset.model_copy(update={"queries": queries})
