"""Datasets made from others, and datasets of a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset


def asked_differently(dataset: EmbeddingQAFinetuneDataset) -> EmbeddingQAFinetuneDataset:
    """The same passages and ids with the words of each query in reverse order, so that no query is the same."""
    queries = {i: " ".join(reversed(text.split())) for i, text in dataset.queries.items()}
    return dataset.model_copy(update={"queries": queries})


def data_file(name: str) -> Path:
    """A dataset of the folder LORA_EMBED_DATA; the test is skipped where there is none."""
    folder = Path(os.environ.get("LORA_EMBED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"{name} is not in {folder}; LORA_EMBED_DATA names another folder")
    return folder / name
