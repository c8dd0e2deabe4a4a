"""Choose the weights with which adapters are merged."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval
from llama_index_lora_embed.evaluation.sweep import Sweep, check_metric
from llama_index_lora_embed.models.merge import Combination, check_adapters, check_weights, merge_adapters
from llama_index_lora_embed.models.opened_adapter import open_adapter

Weights = tuple[float, ...]


def tune_merge(
    adapters: Sequence[str | os.PathLike[str]],
    dataset: EmbeddingQAFinetuneDataset,
    *,
    weights: Sequence[Sequence[float]] | None = None,
    metric: str = "ndcg@10",
    combination: Combination = "linear",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    max_seq_length: int | None = None,
    base_model: str | None = None,
    cache_folder: str | None = None,
    trust_remote_code: bool = False,
    **embedding: Any,
) -> Sweep[Weights]:
    """Evaluate merges of adapters with several weights, and compare the best one with the base.

    The base as installed (all weights 0) and each adapter alone (weight 1) are always evaluated. One half of the
    queries chooses the weights, and the verdict on them rests on the other half, so that it needs at least twenty
    (`Sweep`).

    Args:
        adapters: See `merge_adapters`.
        dataset: Validation dataset that no adapter was trained on, with queries of all the domains.
        weights: Weights to evaluate, one for each adapter; None for the mean, half of the mean, and the mean of each
            adapter with all.
        metric: One of `metrics.NAMES`.
        combination: See `merge_adapters`, also for the further arguments until trust_remote_code.
        density: See `merge_adapters`.
        rank: See `merge_adapters`.
        seed: See `merge_adapters`.
        max_seq_length: See `merge_adapters`.
        base_model: See `merge_adapters`.
        cache_folder: See `merge_adapters`.
        trust_remote_code: See `merge_adapters`.
        **embedding: Further arguments of `LoraEmbedding`: device, prompts, ...

    Returns:
        Weights to evaluation, the base first. Among ties, the weights with the lowest sum are the best.

    Raises:
        ConfigError: As `merge_adapters`, or the metric is unknown.
        DatasetError: The dataset is empty or inconsistent.
        LoraEmbedError: As `merge_adapters`.

    Example:
        >>> sweep = tune_merge(["runs/legal", "runs/hr"], val_dataset)  # doctest: +SKIP
        >>> merge_adapters(["runs/legal", "runs/hr"], "runs/both", weights=sweep.best)  # doctest: +SKIP
    """
    check_metric(metric)
    places = check_adapters(adapters)
    if isinstance(weights, str) or not isinstance(weights, (Sequence, type(None))):
        raise ConfigError(
            f"weights={weights!r}", "a list of weights for the adapters", "weights=[[0.5, 0.5], [0.7, 0.3]]"
        )
    tried = _default_weights(len(places)) if weights is None else [check_weights(w, len(places)) for w in weights]
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset, "dataset").check("evaluation dataset")
    base = (0.0,) * len(places)
    alone = [tuple(float(i == place) for i in range(len(places))) for place in range(len(places))]
    embedding |= {"cache_folder": cache_folder, "trust_remote_code": trust_remote_code}
    evaluations: dict[Weights, RetrievalEvaluation] = {}
    with tempfile.TemporaryDirectory() as folder:
        # all are merged first: what cannot be merged is reported before anything is embedded
        merged = {
            setting: merge_adapters(
                places,
                Path(folder) / str(number),
                weights=setting,
                combination=combination,
                density=density,
                rank=rank,
                seed=seed,
                max_seq_length=max_seq_length,
                pooling=embedding.get("pooling"),
                base_model=base_model,
                cache_folder=cache_folder,
                trust_remote_code=trust_remote_code,
            )
            for number, setting in enumerate(dict.fromkeys([*alone, *tried]))
            if any(setting)
        }
        found = open_adapter(places[0], base_model=base_model, cache_folder=cache_folder).base
        untuned = LoraEmbedding(base_model=found.model_id, revision=found.revision, **embedding)
        evaluations[base] = evaluate_retrieval(untuned, dataset)
        origins: list[Any] = []
        for setting, adapter in merged.items():
            model = LoraEmbedding(adapter.path, base_model=base_model, **embedding)
            evaluations[setting] = evaluate_retrieval(model, dataset)
            origins.append(None if model.manifest is None else model.manifest.trained_on)
    trained_on = None if None in origins else {origin for found in origins for origin in found}
    return Sweep.of(evaluations, dataset, metric, base, lambda setting: round(sum(map(abs, setting)), 9), trained_on)


def _default_weights(count: int) -> Iterator[Weights]:
    """The mean, half of it, and half-way between each adapter and the mean."""
    share = 1 / count
    yield (share,) * count
    yield (share / 2,) * count
    for adapter in range(count):
        yield tuple(share / 2 + (0.5 if i == adapter else 0.0) for i in range(count))
