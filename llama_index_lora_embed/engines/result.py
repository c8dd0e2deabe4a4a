"""The result of a run, and the adapter directory that it writes."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError
from llama_index_lora_embed.evaluation.metrics import HEADLINE

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.config import FinetuneConfig
    from llama_index_lora_embed.data import BuildReport, EmbeddingQAFinetuneDataset, LabelledPairs
    from llama_index_lora_embed.data.training_data import TrainingData
    from llama_index_lora_embed.engines.run_verdict import BaseChange, RunVerdict
    from llama_index_lora_embed.evaluation import Comparison, RetrievalComparison, Verdict
    from llama_index_lora_embed.models.adapter_directory import Manifest
    from llama_index_lora_embed.models.base_model import BaseInfo
    from llama_index_lora_embed.training.lengths import Truncation
    from llama_index_lora_embed.training.negatives.mining import MiningReport
    from llama_index_lora_embed.training.train import TrainingOutcome


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a run; print it.

    Attributes:
        adapter_path: The adapter directory.
        fingerprint: Fingerprint of the model in it.
        verdict: BETTER, LIKELY BETTER, NO CLEAR DIFFERENCE, WORSE or NOT EVALUATED.
        summary: The verdict in one sentence, with the queries that it is based on.
        base_metrics: Metrics on the validation data, from 0 to 1, of the base as installed: with its own length,
            prompts and pooling. Empty if not evaluated.
        tuned_metrics: Metrics of the model in the directory.
        comparison: The difference with its interval; None if not evaluated.
        best_step: Step of the weights in the directory, the latest of those within a standard error of the best; 0
            means that training gained nothing.
        max_seq_length: Tokens that the model in the directory reads of a text.
        window: Tokens of the windows in which it reads them; None without windows.
        base_change: The base with the run's length, windows, prompts or pooling; None where it reads the validation
            data as the base as installed does.
        steps: Steps trained.
        history: Step and metrics of every evaluation, on the data on which steps were compared (`selected_on`).
        truncation: The chosen length, and how many texts it truncates.
        train_seconds: Wall time of training without evaluations.
        evaluation_seconds: Wall time of all evaluations.
        wall_seconds: Wall time of `finetune()`, from loading the base to the written directory.
        precision: "bf16" or "fp32".
        data_report: What became of the nodes; None if a dataset was given.
        mined: What each round of mining found.
        negatives: With `tune="query"`, what queries were compared with, "corpus" or "answered".
        evaluations: Of the base and of the tuned model, query by query or pair by pair; None if not evaluated.
        val_dataset: The validation data.
        trained_on: Origins of the queries that the model was trained on; None for labelled pairs.
        selected_on: Number of queries and of passages on which steps were compared; None for all validation data.
    """

    adapter_path: str
    fingerprint: str
    verdict: Verdict
    summary: str
    base_metrics: dict[str, float]
    tuned_metrics: dict[str, float]
    comparison: Comparison | None
    best_step: int
    max_seq_length: int
    steps: int
    history: list[dict[str, Any]]
    truncation: Truncation
    train_seconds: float
    precision: str
    base_change: BaseChange | None = None
    data_report: BuildReport | None = None
    mined: tuple[MiningReport, ...] = ()
    negatives: str | None = None
    evaluations: tuple[Any, Any] | None = field(default=None, repr=False)
    val_dataset: EmbeddingQAFinetuneDataset | LabelledPairs | None = field(default=None, repr=False)
    trained_on: tuple[str, ...] | None = None
    selected_on: tuple[int, int] | None = None
    evaluation_seconds: float = 0.0
    wall_seconds: float = 0.0
    window: int | None = None

    @classmethod
    def of(
        cls,
        outcome: TrainingOutcome,
        path: str,
        manifest: Manifest,
        verdict: RunVerdict,
        mined: tuple[MiningReport, ...],
        data_report: BuildReport | None,
        val_dataset: TrainingData | None,
    ) -> FinetuneResult:
        """The result of a run from its parts."""
        from llama_index_lora_embed.evaluation import Verdict

        best, comparison = outcome.selection, verdict.comparison
        return cls(
            adapter_path=path,
            fingerprint=manifest.fingerprint,
            verdict=Verdict.NOT_EVALUATED if comparison is None else comparison.verdict,
            summary=verdict.summary,
            base_metrics=verdict.metrics.get("base", {}),
            tuned_metrics=verdict.metrics.get("tuned", {}),
            comparison=comparison,
            best_step=best.best_step if comparison is not None else outcome.steps,
            max_seq_length=manifest.max_seq_length,
            steps=outcome.steps,
            history=best.history,
            truncation=outcome.truncation,
            train_seconds=outcome.train_seconds,
            precision=outcome.precision,
            base_change=verdict.change,
            data_report=data_report,
            mined=mined,
            negatives=outcome.negatives,
            evaluations=None if comparison is None else (best.reference, best.kept),
            val_dataset=val_dataset,
            trained_on=verdict.trained_on,
            selected_on=None if best.subset is None else (len(best.subset["queries"]), len(best.subset["passages"])),
            evaluation_seconds=best.seconds,
            window=manifest.window,
        )

    def compare(self) -> RetrievalComparison:
        """Base against tuned on the validation queries: metrics, slices, queries improved and degraded.

        Raises:
            ConfigError: The run was not evaluated on queries.
        """
        from llama_index_lora_embed.evaluation import RetrievalEvaluation, compare_retrieval

        if self.evaluations is None or not isinstance(self.evaluations[0], RetrievalEvaluation):
            raise ConfigError(
                "a run that was not evaluated on queries", "one with a val_dataset of queries", "Train with one."
            )
        found = compare_retrieval(*self.evaluations, self.val_dataset, trained_on=self.trained_on)  # type: ignore[arg-type]
        return found if self.comparison is None else replace(found, comparison=self.comparison)

    def write_report(
        self, path: str | os.PathLike[str] | None = None, *, figures: str | os.PathLike[str] | None = None
    ) -> Path:
        """One self-contained page on this run (`evaluation.write_report`).

        Args:
            path: File to write; None for `report.html` in `<adapter_path>.run`.
            figures: Folder for its pictures as PNG files; None writes none.

        Returns:
            The file.

        Raises:
            ConfigError: The run was not evaluated.
            MissingExtraError: The extra "report" is not installed.
            OutputDirectoryError: The page cannot be written.
        """
        from llama_index_lora_embed.evaluation import PairEvaluation, RunFacts, write_report

        evaluations: Any = self.evaluations
        if evaluations is None:
            raise ConfigError("a run that was not evaluated", "one with a val_dataset", "Train with one.")
        return write_report(
            path or Path(f"{self.adapter_path}.run") / "report.html",
            evaluations if isinstance(evaluations[0], PairEvaluation) else self.compare(),
            run=RunFacts.read(self.adapter_path, str(self.data_report or "")),
            figures=figures,
        )

    def __str__(self) -> str:
        lines = [self.summary]
        if self.base_metrics:
            shown = [name for name in HEADLINE if name in self.base_metrics] or list(self.base_metrics)
            widths = {name: max(11, len(name) + 2) for name in shown}
            change = {} if self.base_change is None else {self.base_change.name: self.base_change.metrics}
            rows = {"base": self.base_metrics, **change, "tuned": self.tuned_metrics}
            first = max(8, *(len(row) + 1 for row in rows))
            lines.append(f"{'':{first}}" + "".join(f"{name:>{widths[name]}}" for name in shown))
            for row, values in rows.items():
                lines.append(f"{row:{first}}" + "".join(f"{values[name]:{widths[name]}.3f}" for name in shown))
            if self.base_change is not None:
                lines.append(str(self.base_change))
        lines.append(f"{self.truncation}")
        chosen = "" if self.selected_on is None else " (chosen on {} queries and {} passages)".format(*self.selected_on)
        lines.append(f"adapter of step {self.best_step} of {self.steps}{chosen} in {self.adapter_path}")
        lines.append(
            f"{self.wall_seconds:.0f} s, of which {self.train_seconds:.0f} s were training steps and "
            f"{self.evaluation_seconds:.0f} s evaluations"
        )
        return "\n".join(lines)


def write_run(
    target: Path,
    run_dir: Path,
    config: FinetuneConfig,
    dataset: TrainingData,
    model: SentenceTransformer,
    base: BaseInfo,
    parent: dict[str, Any] | None,
    outcome: TrainingOutcome,
    mined: tuple[MiningReport, ...],
    verdict: RunVerdict,
) -> Manifest:
    """Write the adapter directory with its manifest; checkpoints that nobody asked for are removed then.

    Args:
        target: What `adapter_directory.check_output` has passed.
        run_dir: Where the checkpoints are.
        config: The run's configuration.
        dataset: Training data, before mining.
        model: With the weights to write.
        base: The base model.
        parent: Path and fingerprint of the adapter that the run continues.
        outcome: Of the training.
        mined: What each round of mining found.
        verdict: The verdict.

    Returns:
        The manifest of the directory.

    Raises:
        OutputDirectoryError: It could not be written; the trained weights are in the checkpoints.
    """
    from llama_index_lora_embed.models import adapter_directory
    from llama_index_lora_embed.training.checkpointing import checkpoints

    best = outcome.selection
    mining = {"mined_negatives": [report.mean_negatives for report in mined]} if dataset.kind == "queries" else {}
    resolved: dict[str, Any] = {"precision": outcome.precision}
    if outcome.teacher is not None:
        resolved["teacher"] = outcome.teacher
    if outcome.negatives is not None:
        resolved["negatives"] = outcome.negatives
    manifest = adapter_directory.Manifest.of(
        model,
        base.to_dict(),
        tune=config.training.tune,
        parent=parent,
        dataset={**dataset.summary(), **mining},
        settings={**config.result_affecting(), **resolved},
        metrics=verdict.metrics,
        verdict=verdict.summary,
        base_change="" if verdict.change is None else str(verdict.change),
        best_step=None if best.base is None else best.best_step,
        truncation=asdict(outcome.truncation),
    )
    try:
        written = adapter_directory.write_adapter(model, target, manifest, base.weights_sha256)
    except OutputDirectoryError as error:
        error.hint += (
            f" The trained weights are kept in {str(run_dir)!r}: resume_from_checkpoint=True only writes them."
        )
        raise
    if not config.training.save_checkpoints:
        checkpoints.clear_checkpoints(run_dir)
    return written
