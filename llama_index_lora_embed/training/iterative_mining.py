"""Training in rounds: mine hard negatives, train on them, mine again with the tuned model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import MiningSettings, TrainingSettings
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.split import Trainable
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.lora import adapter_weights
from llama_index_lora_embed.training.negatives.mining import MiningReport, mine_hard_negatives
from llama_index_lora_embed.training.train import TrainingOutcome, set_length, train


def train_with_mining(
    model: SentenceTransformer,
    dataset: Trainable,
    settings: TrainingSettings,
    run_dir: Path,
    mining: MiningSettings | None,
    *,
    best: CheckpointSelection,
    use_all_docs: bool = False,
    recorded: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[TrainingOutcome, tuple[MiningReport, ...]]:
    """Train, where asked for on mined hard negatives; later rounds mine with what came before and train it on.

    The base mines for the first round, at the `max_seq_length` that training uses. Each round starts from the best
    weights so far, with a schedule of its own, and these stay a candidate: a round that gains nothing changes
    nothing. Negatives are mined from the training corpus alone. The dataset's own hard negatives stay, and come
    first, in every round.

    Args:
        model: Loaded base.
        dataset: Checked training set.
        settings: Of each round.
        run_dir: Of the first round; later ones write into `round2` and so on inside it.
        mining: How to mine, and how many rounds; None trains once, on the hard negatives that the dataset has.
        use_all_docs: As for `train`.
        best: As for `train`.
        recorded: As for `train`; the round's number and what it starts from are added.
        **kwargs: As for `train`.

    Returns:
        What came of all rounds together, steps counted through; and what each round's mining found.

    Raises:
        DatasetError: There is nothing to mine.
        LoraEmbedError: As `train`.
    """
    common = {"use_all_docs": use_all_docs, **kwargs}
    if mining is None:
        return train(model, dataset, settings, run_dir, best=best, recorded=recorded, **common), ()
    assert isinstance(dataset, EmbeddingQAFinetuneDataset)
    truncation = set_length(model, dataset, settings, use_all_docs)
    reports: list[MiningReport] = []
    total: TrainingOutcome | None = None
    for number in range(1, mining.rounds + 1):
        mined, report = mine_hard_negatives(dataset, model, mining)
        reports.append(report)
        outcome = train(
            model,
            mined,
            settings,
            run_dir if number == 1 else run_dir / f"round{number}",
            best=best if total is None else _candidate(total.best),
            recorded={**(recorded or {}), "round": number, "start": None if total is None else _weights_digest(model)},
            truncation=truncation,
            **common,
        )
        total = outcome if total is None else _joined(total, outcome)
    assert total is not None
    return total, tuple(reports)


def _weights_digest(model: SentenceTransformer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_weights(model).items()):
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()


def _candidate(best: CheckpointSelection) -> CheckpointSelection:
    """What the rounds before gave, as step 0 of the next one."""
    if best.evaluate is None or best.best is None:
        return CheckpointSelection(best.evaluate, best.metric)
    start = {"step": 0, "metrics": dict(best.best.metrics)}
    top = best.best.scores(best.metric)
    return CheckpointSelection(
        best.evaluate, best.metric, [start], base=best.best, best=best.best, top=top, weights=best.weights
    )


def _joined(before: TrainingOutcome, after: TrainingOutcome) -> TrainingOutcome:
    """Two rounds as one run, the second's steps counted on from the first's."""
    history = [{**entry, "step": entry["step"] + before.steps} for entry in after.best.history if entry["step"] > 0]
    best = replace(
        after.best,
        history=[*before.best.history, *history],
        best_step=after.best.best_step + before.steps if after.best.best_step else before.best.best_step,
        base=before.best.base,
        seconds=before.best.seconds + after.best.seconds,
    )
    seconds = before.train_seconds + after.train_seconds
    return replace(after, best=best, steps=before.steps + after.steps, train_seconds=seconds)
