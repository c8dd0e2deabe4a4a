"""The result of a run of `EmbeddingAdapterFinetuneEngine`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.evaluation.metrics import HEADLINE

if TYPE_CHECKING:
    from llama_index_lora_embed.data import EmbeddingQAFinetuneDataset
    from llama_index_lora_embed.evaluation import Comparison, RetrievalComparison, RetrievalEvaluation, Verdict


@dataclass(frozen=True)
class EmbeddingAdapterResult:
    """The result of a run; print it.

    Attributes:
        adapter_path: The written directory.
        fingerprint: Fingerprint of the model with this adapter.
        verdict: BETTER, LIKELY BETTER, NO CLEAR DIFFERENCE, WORSE or NOT EVALUATED.
        summary: The verdict in one sentence, with the queries that it is based on.
        base_metrics: Metrics of the embedding model alone on the validation data, from 0 to 1; empty if not evaluated.
        tuned_metrics: Metrics with the adapter.
        comparison: The difference with its interval; None if not evaluated.
        best_step: Step of the written adapter, the latest of those within a standard error of the best; 0 means that
            training gained nothing, and that the written adapter leaves vectors as they are.
        steps: Steps trained.
        history: Step and metrics of every evaluation.
        negatives: What queries were compared with, "corpus" or "answered".
        negatives_tried: Mean nDCG@10 of either on folds of the training queries; empty if there was nothing to choose.
        warnings: Peculiarities of the embedding model and its vectors, a sentence each.
        embedding_seconds: Wall time until all vectors were there.
        train_seconds: Wall time of the training, the choice of negatives included, without evaluations.
        evaluations: Of the model alone and with the adapter, query by query; None if not evaluated.
        val_dataset: The validation data.
        trained_on: Origins of the training queries.
    """

    adapter_path: str
    fingerprint: str
    verdict: Verdict
    summary: str
    base_metrics: dict[str, float]
    tuned_metrics: dict[str, float]
    comparison: Comparison | None
    best_step: int
    steps: int
    history: list[dict[str, Any]]
    negatives: str
    negatives_tried: dict[str, float]
    warnings: list[str]
    embedding_seconds: float
    train_seconds: float
    evaluations: tuple[RetrievalEvaluation, RetrievalEvaluation] | None = field(default=None, repr=False)
    val_dataset: EmbeddingQAFinetuneDataset | None = field(default=None, repr=False)
    trained_on: tuple[str, ...] = ()

    def compare(self) -> RetrievalComparison:
        """The model alone against the one with the adapter on the validation queries: metrics, slices, single queries.

        Raises:
            ConfigError: The run was not evaluated.
        """
        from llama_index_lora_embed.evaluation import compare_retrieval

        if self.evaluations is None or self.val_dataset is None:
            raise ConfigError("a run that was not evaluated", "one with a val_dataset", "Train with one.")
        return compare_retrieval(*self.evaluations, self.val_dataset, trained_on=self.trained_on)

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
        from llama_index_lora_embed.evaluation import RunFacts, write_report

        place = path or Path(f"{self.adapter_path}.run") / "report.html"
        return write_report(place, self.compare(), run=RunFacts.read(self.adapter_path), figures=figures)

    def __str__(self) -> str:
        lines = [self.summary]
        if self.base_metrics:
            lines.append(f"{'':8}" + "".join(f"{name:>11}" for name in HEADLINE))
            for row, values in (("base", self.base_metrics), ("tuned", self.tuned_metrics)):
                lines.append(f"{row:8}" + "".join(f"{values[name]:11.3f}" for name in HEADLINE))
        lines += self.warnings
        lines.append(f"adapter of step {self.best_step} of {self.steps} in {self.adapter_path}")
        lines.append(
            f"{self.embedding_seconds:.1f} s until all texts were embedded, {self.train_seconds:.1f} s of training"
        )
        return "\n".join(lines)
