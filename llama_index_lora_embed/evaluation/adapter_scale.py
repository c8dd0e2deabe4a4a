"""Choose the scale of an adapter: how much of it to apply."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llama_index_lora_embed.config.base import is_share
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval
from llama_index_lora_embed.evaluation.sweep import Sweep, check_metric

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


def tune_scale(
    adapter_path: str | os.PathLike[str],
    dataset: EmbeddingQAFinetuneDataset,
    *,
    scales: Sequence[float] = SCALES,
    metric: str = "ndcg@10",
    **embedding: Any,
) -> Sweep[float]:
    """Evaluate an adapter at several scales. Interpolating between base and adapter reduces forgetting.

    WiSE-FT calls it weight-space ensembling (Wortsman et al. 2022, arXiv 2109.01903, section 3). One half of the
    queries chooses the scale, and the verdict on it rests on the other half, so that it needs at least twenty
    (`Sweep`).

    Args:
        adapter_path: Folder or Hub id of a plain LoRA.
        dataset: Validation dataset, not the training dataset.
        scales: Numbers from 0 to 1.
        metric: One of `metrics.NAMES`.
        **embedding: Further arguments of `LoraEmbedding`: device, prompts, ...

    Returns:
        Scale to evaluation; 0 is the base with the adapter's length, prompts and windows. Among ties, the lowest scale
        is the best.

    Raises:
        ConfigError: A scale is out of range, the metric is unknown, or the adapter is not a plain LoRA.
        DatasetError: The dataset is empty or inconsistent.

    Example:
        >>> sweep = tune_scale("runs/handbook", val_dataset)  # doctest: +SKIP
        >>> embed_model = LoraEmbedding("runs/handbook", adapter_scale=sweep.best)  # doctest: +SKIP
    """
    if not scales or not all(map(is_share, scales)):
        raise ConfigError(f"scales={scales!r}", "at least one number from 0 to 1", f"scales={SCALES}")
    check_metric(metric)
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset, "dataset").check("evaluation dataset")
    evaluations: dict[float, RetrievalEvaluation] = {}
    for scale in sorted({float(scale) for scale in scales}):
        # all of them share one base model in memory
        embed_model = LoraEmbedding(
            adapters={"tuned": adapter_path}, adapter="tuned", adapter_scale=scale, max_adapters=1, **embedding
        )
        evaluations[scale] = evaluate_retrieval(embed_model, dataset)
    manifest = embed_model.manifest
    trained_on = None if manifest is None else manifest.trained_on
    return Sweep.of(evaluations, dataset, metric, 0.0, lambda scale: scale, trained_on)
