"""A run of the engine with its own defaults, for tests of what it trains, writes and refuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset, FinetuneResult, LoraFinetuneEngine

QUIET = {"show_progress_bar": False, "device": "cpu"}


def finetune(
    dataset: EmbeddingQAFinetuneDataset, model: str, out: str, **kwargs: Any
) -> tuple[LoraFinetuneEngine, FinetuneResult]:
    """The engine and its result; unlike `make_engine`, with the engine's own learning rate and validation data."""
    engine = LoraFinetuneEngine(dataset, model, out, **{"batch_size": 8, "epochs": 2, **QUIET, **kwargs})
    return engine, engine.finetune()


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "runs" / "adapter")


@pytest.fixture(autouse=True)
def _truncated_texts_are_not_warned_of() -> Iterator[None]:
    """The limit of the tiny model is 16 tokens; tests that want the warning ask for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*texts are longer")
        yield
