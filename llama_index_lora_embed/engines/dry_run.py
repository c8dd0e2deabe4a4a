"""What a run will do and how long it will take: all is checked and read, a second of it is tried, nothing is kept."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.config import DISTILLED, FinetuneConfig, ObjectiveSettings
from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.engines.run import FinetuneRun, run_of
from llama_index_lora_embed.engines.starting_model import as_decided

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.data import BuildReport
    from llama_index_lora_embed.data.training_data import TrainingData
    from llama_index_lora_embed.training.lengths import Truncation
    from llama_index_lora_embed.training.trial import Trial


@dataclass(frozen=True)
class DryRun:
    """What a run will do.

    Attributes:
        training: What is trained on, as the manifest records it.
        validation: What is evaluated on; None for a run without a verdict.
        truncation: The length of texts, and how many are truncated.
        trial: Steps, memory and the time of a step; None where no step was tried.
        evaluations: Evaluations of steps, the base included.
        train_seconds: Estimated time of the training steps; None where no step was tried.
        evaluation_seconds: Estimated time of the evaluations.
        device: Of the model.
        output: Adapter directory that will be written.
        free_mb: Free disk space there.
        notes: What else is known, and what is not in the estimate; a sentence each.
        data_report: What becomes of the nodes; None if a dataset is named.
    """

    training: dict[str, Any]
    validation: dict[str, Any] | None
    truncation: Truncation
    trial: Trial | None
    evaluations: int
    train_seconds: float | None
    evaluation_seconds: float
    device: str
    output: str
    free_mb: float
    notes: tuple[str, ...] = ()
    data_report: BuildReport | None = None

    def __str__(self) -> str:
        lines = [f"training: {_counts(self.training)}"]
        lines.append(f"validation: {_counts(self.validation) if self.validation else 'none, so there is no verdict'}")
        lines += [str(self.data_report)] if self.data_report is not None else []
        lines.append(f"truncation: {self.truncation}")
        if self.trial is not None and self.train_seconds is not None:
            trial = self.trial
            lines.append(
                f"steps: {trial.steps} of {trial.batch_size}, {trial.steps_per_epoch} per epoch; "
                f"{trial.step_seconds:.2f} s each in {trial.precision} on {self.device} (mean of {trial.counted})"
            )
            memory = "not known" if trial.memory_mb is None else f"{trial.memory_mb:,.0f} MB so far"
            lines.append(f"memory: {memory}")
            lines.append(
                f"time: about {_time(self.train_seconds + self.evaluation_seconds)}, of which "
                f"{_time(self.evaluation_seconds)} for {self.evaluations} evaluations"
            )
        lines.append(f"output: {self.output}, {self.free_mb:,.0f} MB free")
        return "\n".join([*lines, *self.notes])


def dry_run(config: FinetuneConfig, *, seconds: float = 1.0, **objects: Any) -> DryRun:
    """Check a run, read its data, load its model, and try about a second of it. Nothing is trained or written.

    An LLM is not asked: queries without one stand for those that it would write. A teacher's scores and mined negatives
    are left out of the steps that are tried, and of the estimate.

    Args:
        config: Of the run.
        seconds: Wall time of the steps that are tried, and half of it for texts that are embedded.
        **objects: Of `run_finetune`: `dataset`, `val_dataset`, `nodes`, `lora_config`.

    Raises:
        LoraEmbedError: As `run_finetune`, before its first step.
    """
    from llama_index_lora_embed.training.examples import make_groups
    from llama_index_lora_embed.training.train import set_length
    from llama_index_lora_embed.training.trial import try_steps

    notes: list[str] = []
    generators = config.data.query_generators or ()
    if any(one.kind == "llm" for one in generators):
        config = config.replace(data=config.data.replace(query_generators=None))
    if objects.pop("llm", None) is not None or any(one.kind == "llm" for one in generators):
        notes.append("The LLM was not asked: queries that need none stand for its own.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the result says it
        run = run_of(config, **objects)
        model, _, parent, _ = run.load()
        run = replace(run, config=as_decided(run.config, model, parent))
        dataset, settings = run.dataset, run.config.training
        groups = make_groups(dataset, run.config.data.use_all_docs) if dataset.kind == "queries" else []
        truncation = set_length(model, dataset, groups, settings)
    notes += [run.hold_out_note] if run.hold_out_note else []
    texts_per_second = _embedding_speed(model, _texts(dataset), seconds / 2)
    trial = None
    if settings.tune == "query":
        notes.append("tune='query': the steps, which are short, were not tried; the passages are embedded once before.")
    else:
        trial = try_steps(
            model, dataset, groups, _without_teacher(run, notes), seconds=seconds, lora_config=run._lora_config()
        )
    rounds = 1 if run.config.mining is None else run.config.mining.rounds
    if run.config.mining is not None:
        notes.append("Mining hard negatives, and the longer steps with them, are not in the estimate.")
    evaluations, evaluation_seconds = _evaluations(run, trial, texts_per_second, rounds)
    output = Path(run.config.output.model_output_path)
    return DryRun(
        training=dataset.summary(),
        validation=None if run.val_dataset is None else run.val_dataset.summary(),
        truncation=truncation,
        trial=None if trial is None else replace(trial, steps=trial.steps * rounds),
        evaluations=evaluations,
        train_seconds=None if trial is None else trial.steps * rounds * trial.step_seconds,
        evaluation_seconds=evaluation_seconds,
        device=str(model.device),
        output=str(output),
        free_mb=free_mb(output),
        notes=tuple(notes),
        data_report=run.data_report,
    )


def free_mb(path: str | os.PathLike[str]) -> float:
    """Free megabytes of the disk that a path is on, or will be."""
    place = Path(path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / 2**20


def _without_teacher(run: FinetuneRun, notes: list[str]) -> FinetuneConfig:
    config = run.config
    if run.teacher is None and config.teacher is None:
        return config
    notes.append("The teacher's scores are not in the estimate.")
    in_batch = config.objective.name in (None, *DISTILLED)
    return config.replace(teacher=None, objective=ObjectiveSettings() if in_batch else config.objective)


def _texts(dataset: TrainingData) -> list[str]:
    """Texts as an evaluation embeds them."""
    return list(dataset.corpus.values()) if isinstance(dataset, EmbeddingQAFinetuneDataset) else dataset.texts1


def _embedding_speed(model: SentenceTransformer, texts: list[str], seconds: float) -> float:
    """Texts embedded per second."""
    from llama_index_lora_embed.embedding.encode import encode

    spent, done, size = 0.0, 0, 8
    while spent < seconds:
        sample = [texts[(done + place) % len(texts)] for place in range(size)]
        started = time.perf_counter()
        encode(model, sample, "document")
        spent, done, size = spent + time.perf_counter() - started, done + size, min(2 * size, 256)
    return done / spent


def _evaluations(run: FinetuneRun, trial: Trial | None, texts_per_second: float, rounds: int) -> tuple[int, float]:
    """Number of evaluations in training, and the seconds of all; base and kept step are evaluated on all data."""
    val, settings = run.val_dataset, run.config.training
    if val is None:
        return 0, 0.0
    if isinstance(val, EmbeddingQAFinetuneDataset):
        everything = len(val.corpus) + len(val.queries)
        subset = min(everything, 2 * settings.selection_passages or everything)
    else:
        everything = subset = 2 * len(val.texts1)
    count = 1
    if trial is not None:
        between = trial.steps // settings.evaluation_steps if settings.evaluation_steps else 0
        count += (between + settings.epochs) * rounds
    return count, (2 * everything + (count - 1) * subset) / texts_per_second


def _counts(summary: dict[str, Any]) -> str:
    """What a summary counts, in words."""
    words = [f"{value} {name}" for name, value in summary.items() if isinstance(value, int)]
    origins = summary.get("origins")
    return ", ".join(words) + (f" ({', '.join(f'{n} {o}' for o, n in origins.items())})" if origins else "")


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
