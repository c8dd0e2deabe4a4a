"""Objective "distillation": the scores of a cross-encoder, and the student's similarities that learn them."""

from __future__ import annotations

import gc
import json
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor

from llama_index_lora_embed.core.errors import ConfigError, ModelNotFoundError
from llama_index_lora_embed.models.base_model import describe_base


def scaled_cosine(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    """Cosine similarity divided by a temperature, as in the softmaxes of the other objectives.

    MarginMSELoss would ask cosines to differ by as much as a teacher's scores, which have no bounds.
    """
    return pairwise_cos_sim(left.float(), right.float()) / temperature


def teacher_scores(
    teacher: str, rows: list[dict[str, Any]], device: torch.device, trust_remote_code: bool
) -> list[list[float]]:
    """Logits of a cross-encoder for each row's positive and negatives.

    The model (a folder, or an id on the Hub) is loaded for this call and freed afterwards. Its texts have no prompts.

    Raises:
        ModelNotFoundError: There is no model, or it does not load.
        UnsafeCheckpointError: Its weights are stored as a pickle only.
        ConfigError: It is no cross-encoder with one score, or its scores are not finite.
    """
    from safetensors import SafetensorError
    from sentence_transformers import CrossEncoder

    expected = "a cross-encoder with one score, such as cross-encoder/ms-marco-MiniLM-L6-v2"
    hint = "Pass the folder or the id of a cross-encoder as teacher=."
    base = describe_base(teacher)
    config_file = base.path / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    kinds = config.get("architectures") or []
    # sentence-transformers would put a head of random weights on any other model
    if config_file.exists() and not any("SequenceClassification" in kind for kind in kinds):
        raise ConfigError(f"teacher={teacher!r}, which is a {', '.join(kinds) or 'model'}", expected, hint)
    try:
        model = CrossEncoder(
            str(base.path),
            device=str(device),
            trust_remote_code=trust_remote_code,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelNotFoundError(
            f"teacher={teacher!r}, which does not load ({type(error).__name__}: {error})", expected, hint
        ) from error
    if model.num_labels != 1:
        raise ConfigError(f"teacher={teacher!r} with {model.num_labels} scores", expected, hint)
    columns = [name for name in rows[0] if name != "anchor"]
    pairs = list(dict.fromkeys((row["anchor"], row[name]) for row in rows for name in columns))
    scores = np.asarray(
        model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False),
        dtype=np.float32,
    ).reshape(len(pairs))
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not np.isfinite(scores).all():
        raise ConfigError(f"teacher={teacher!r}, whose scores are NaN or infinite", "finite scores", hint)
    score_of = dict(zip(pairs, scores.tolist(), strict=True))
    return [[score_of[row["anchor"], row[name]] for name in columns] for row in rows]
