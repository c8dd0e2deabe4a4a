"""How much of an adapter to use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index_lora_embed.config.base import is_share
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class ScaleSweep:
    """What each scale gave.

    Attributes:
        best: The scale with the highest mean; of equals the smallest, which is nearest to the base.
        metric: The measure that decided.
        evaluations: Scale to its evaluation; 0 is the base.
    """

    best: float
    metric: str
    evaluations: dict[float, RetrievalEvaluation] = field(repr=False)

    def scores(self) -> dict[float, float]:
        """Scale to its mean of the measure."""
        return {scale: found.metrics[self.metric] for scale, found in self.evaluations.items()}


def tune_scale(
    adapter_path: str | os.PathLike[str],
    dataset: EmbeddingQAFinetuneDataset,
    *,
    scales: Sequence[float] = SCALES,
    metric: str = "ndcg@10",
    **embedding: Any,
) -> ScaleSweep:
    """Evaluate an adapter at several scales; the weights between base and adapter forget less.

    An interpolation of base and fine-tuned weights is what WiSE-FT calls weight-space ensembling (Wortsman et al. 2022,
    arXiv 2109.01903, section 3); for a LoRA it costs a number. Where scales were chosen by a dataset, its measures
    flatter the chosen one: judge by another.

    Args:
        adapter_path: Folder or Hub id of a plain LoRA.
        dataset: Validation questions, not those that were trained on.
        scales: From 0 to 1 each.
        metric: Of `RetrievalEvaluation.metrics`.
        **embedding: More for `LoraEmbedding`: device, prompts, ...

    Raises:
        ConfigError: A scale is out of bounds, the measure is unknown, or the adapter is more than a LoRA.
        DatasetError: The dataset is empty or inconsistent.

    Example:
        >>> sweep = tune_scale("runs/handbook", val_dataset)  # doctest: +SKIP
        >>> embed_model = LoraEmbedding("runs/handbook", adapter_scale=sweep.best)  # doctest: +SKIP
    """
    wrong = [repr(s) for s in scales if not is_share(s)]
    if wrong or not scales:
        raise ConfigError(f"scales with {', '.join(wrong) or 'none in it'}", "numbers from 0 to 1", f"scales={SCALES}")
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset, "dataset")
    evaluations: dict[float, RetrievalEvaluation] = {}
    for scale in sorted({float(scale) for scale in scales}):
        # one base in memory for all of them
        embed_model = LoraEmbedding(
            adapters={"tuned": adapter_path}, adapter="tuned", adapter_scale=scale, max_adapters=1, **embedding
        )
        evaluations[scale] = evaluate_retrieval(embed_model, dataset)
        if metric not in evaluations[scale].metrics:
            known = ", ".join(evaluations[scale].metrics)
            raise ConfigError(f"metric={metric!r}", f"one of {known}", "metric='ndcg@10'")
    best = max(evaluations, key=lambda scale: (evaluations[scale].metrics[metric], -scale))
    return ScaleSweep(best, metric, evaluations)
