"""Iterative mining: mine hard negatives, train on them, mine again with the tuned model, and so on."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.data.training_data import TrainingData
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.examples import make_groups
from llama_index_lora_embed.training.lora import adapter_weights
from llama_index_lora_embed.training.negatives.mining import MiningReport, mine_hard_negatives
from llama_index_lora_embed.training.train import TrainingOutcome, set_length, train


def train_with_mining(
    model: SentenceTransformer,
    dataset: TrainingData,
    config: FinetuneConfig,
    run_dir: Path,
    *,
    selection: CheckpointSelection,
    run_record: dict[str, Any],
    **kwargs: Any,
) -> tuple[TrainingOutcome, tuple[MiningReport, ...]]:
    """Train once, or in the rounds of mining that the configuration asks for.

    The base mines for the first round, with the `max_seq_length` of the training. Each round starts from the best
    weights so far, with a learning-rate schedule of its own, and these weights stay a candidate: a round that gains
    nothing changes nothing. Negatives are mined from the training corpus alone. The dataset's own hard negatives come
    first in every round. Later rounds have the run directories `round2` and so on inside the first one's, and record
    their number and a digest of their first weights. Arguments are those of `train`.

    Returns:
        The outcome of all rounds together, with steps counted through; and the report of each round's mining.

    Raises:
        DatasetError: Too few passages, or nothing can be mined.
        ConfigError: The settings ask for a length that the model's positions do not allow.
        LoraEmbedError: As `train`.
    """
    mining = config.mining
    groups = make_groups(dataset, config.data.use_all_docs) if dataset.kind == "queries" else []
    kwargs["truncation"] = set_length(model, dataset, groups, config.training)
    if mining is None:
        outcome = train(model, dataset, groups, config, run_dir, selection=selection, run_record=run_record, **kwargs)
        return outcome, ()
    assert dataset.kind == "queries"
    reports: list[MiningReport] = []
    total: TrainingOutcome | None = None
    for number in range(1, mining.rounds + 1):
        mined, report = mine_hard_negatives(dataset, model, mining)
        reports.append(report)
        outcome = train(
            model,
            mined,
            groups,
            config,
            run_dir if number == 1 else run_dir / f"round{number}",
            selection=selection if total is None else _next_selection(total.selection, model),
            run_record={**run_record, "round": number, "start": None if total is None else _weights_digest(model)},
            **kwargs,
        )
        total = outcome if total is None else _joined(total, outcome)
    assert total is not None
    return total, tuple(reports)


def _weights_digest(model: SentenceTransformer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_weights(model).items()):
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()


def _next_selection(previous: CheckpointSelection, model: SentenceTransformer) -> CheckpointSelection:
    """The selection of the next round, whose step 0 is the best step of the rounds before, and in the model."""
    best = previous.best
    if previous.evaluator is None or best is None:
        return CheckpointSelection(previous.evaluator, previous.metric, previous.adapter_scale)
    compared = best if previous.subset is None else previous.evaluate(model, previous.subset)
    return replace(
        previous,
        history=[{"step": 0, "metrics": dict(compared.metrics)}],
        best_step=0,
        base=best,
        top_scores=compared.scores(previous.metric),
    )


def _joined(before: TrainingOutcome, after: TrainingOutcome) -> TrainingOutcome:
    """Two rounds as one run, with the second round's steps counted on from the first's."""
    first, second = before.selection, after.selection
    history = [{**entry, "step": entry["step"] + before.steps} for entry in second.history if entry["step"] > 0]
    selection = replace(
        second,
        history=[*first.history, *history],
        best_step=second.best_step + before.steps if second.best_step else first.best_step,
        base=first.base,
    )
    seconds = before.train_seconds + after.train_seconds
    return replace(after, selection=selection, steps=before.steps + after.steps, train_seconds=seconds)
