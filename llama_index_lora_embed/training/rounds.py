"""Training in rounds: mine hard negatives, train on them, mine again with the tuned model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import MiningSettings, TrainingSettings
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.negatives import MiningReport, mine_hard_negatives
from llama_index_lora_embed.training.run import TrainingOutcome, set_length, train
from llama_index_lora_embed.training.trainer import PRIMARY_METRIC, BestSoFar


def train_in_rounds(
    model: SentenceTransformer,
    dataset: EmbeddingQAFinetuneDataset,
    settings: TrainingSettings,
    mining: MiningSettings | None,
    *,
    use_all_docs: bool = False,
    checkpoint_dir: Path | None = None,
    identity: dict[str, Any] | None = None,
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
        mining: How to mine, and how many rounds; None trains once, on the hard negatives that the dataset has.
        use_all_docs: As for `train`.
        checkpoint_dir: Of the first round; later ones write beside it, with `-round2` and so on at the end.
        identity: As for `train`; the number of the round is added.
        **kwargs: As for `train`.

    Returns:
        What came of all rounds together, steps counted through; and what each round's mining found.

    Raises:
        DatasetError: There is nothing to mine.
        LoraEmbedError: As `train`.
    """
    common = {"use_all_docs": use_all_docs, **kwargs}
    if mining is None:
        return train(model, dataset, settings, checkpoint_dir=checkpoint_dir, identity=identity, **common), ()
    truncation = set_length(model, dataset, settings, use_all_docs)
    reports: list[MiningReport] = []
    total: TrainingOutcome | None = None
    for number in range(1, mining.rounds + 1):
        mined, report = mine_hard_negatives(dataset, model, mining)
        reports.append(report)
        directory = checkpoint_dir
        if directory is not None and number > 1:
            directory = directory.with_name(f"{directory.name}-round{number}")
        outcome = train(
            model,
            mined,
            settings,
            checkpoint_dir=directory,
            identity={**(identity or {}), "round": number},
            truncation=truncation,
            best=None if total is None else _candidate(total.best),
            **common,
        )
        total = outcome if total is None else _joined(total, outcome)
    assert total is not None
    return total, tuple(reports)


def _candidate(best: BestSoFar) -> BestSoFar:
    """What the rounds before gave, as step 0 of the next one."""
    if best.evaluate is None or best.best is None:
        return BestSoFar(best.evaluate)
    start = {"step": 0, "metrics": dict(best.best.metrics)}
    top = best.best.scores(PRIMARY_METRIC)
    return BestSoFar(best.evaluate, [start], base=best.best, best=best.best, top=top, weights=best.weights)


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
