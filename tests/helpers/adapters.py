"""Adapters with random weights, and what they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.models.adapter_directory import Manifest, write_adapter
from llama_index_lora_embed.models.base_model import describe_base, load_base
from tests.conftest import WORDS

TEXTS = [" ".join(WORDS[i : i + 1 + i % 12]) for i in range(30)]


def vectors(*args: Any, **kwargs: Any) -> NDArray[np.float64]:
    """Vectors of `TEXTS` by a `LoraEmbedding` with these arguments."""
    return np.array(LoraEmbedding(*args, **kwargs, device="cpu").get_text_embedding_batch(TEXTS))


def distance(one: ArrayLike, other: ArrayLike) -> float:
    """The largest difference between two vectors, or two lists of them, in an entry."""
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def _randomise(model: torch.nn.Module, std: float) -> None:
    """Draw lora_B, which is zero at first."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def random_adapter(base: str, path: Path, seed: int, *, max_seq_length: int | None = None, **settings: Any) -> Path:
    """Write an adapter directory with a random LoRA; `settings` are those of `LoraConfig` and of `load_base`."""
    found = describe_base(base)
    loading = {name: settings.pop(name) for name in ("query_prompt", "pooling", "window") if name in settings}
    model = load_base(found, device="cpu", **loading)
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **settings}))
    _randomise(model, 0.2)
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    write_adapter(model, path, Manifest.of(model, found.to_dict()), found.weights_sha256)
    return path


def weight_changes(path: str | Path) -> dict[str, torch.Tensor]:
    """Module to the weight change of an adapter, as peft computes it."""
    model = LoraEmbedding(path, merge=False, device="cpu").sentence_transformer
    layers = model.transformers_model.named_modules()
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in layers
        if isinstance(layer, LoraLayer) and "default" in layer.scaling
    }


def peft_adapter(base: str | Path, path: Path, **settings: Any) -> Path:
    """Write what peft alone saves of a random LoRA on a transformers model; `settings` are those of `LoraConfig`."""
    torch.manual_seed(5)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(**{**lora, **settings}))
    _randomise(model, 0.2)
    model.save_pretrained(str(path))
    return path


def plain_adapter(base: str, path: Path, **settings: Any) -> SentenceTransformer:
    """Write what sentence-transformers saves of a random LoRA, and return its model."""
    model = SentenceTransformer(base, device="cpu")
    model.add_adapter(LoraConfig(**{"r": 2, "target_modules": ["query"], **settings}))
    _randomise(model, 0.5)
    model.save_pretrained(str(path))
    return model
