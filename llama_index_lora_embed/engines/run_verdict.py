"""The verdict of a run: what was kept against the base as installed, and what the run changes about the base alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_index_lora_embed.data.training_data import TrainingData, trained_note
from llama_index_lora_embed.evaluation import Comparison, Verdict, compare

if TYPE_CHECKING:
    from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection


@dataclass(frozen=True)
class BaseChange:
    """What the run's length, windows, prompts or pooling change about the base, before any training.

    Attributes:
        name: Of the base with them, as a row of a table: "base, 512 tokens".
        metrics: Its metrics on the validation data.
        comparison: Of the base as installed with it.
    """

    name: str
    metrics: dict[str, float]
    comparison: Comparison

    def __str__(self) -> str:
        return f"{self.name}, against the base as installed: {self.comparison}"


@dataclass(frozen=True)
class RunVerdict:
    """The verdict of a run.

    Attributes:
        summary: In words.
        comparison: Of the base as installed with what was kept; None if nothing was evaluated.
        change: None where the run reads the validation data as the installed base does.
        metrics: Metrics by row of a table: "base", the changed base where there is one, "tuned"; empty if nothing was
            evaluated.
        trained_on: Origins of the queries that the kept weights were trained on; None for labelled pairs.
    """

    summary: str
    comparison: Comparison | None
    change: BaseChange | None
    metrics: dict[str, dict[str, float]]
    trained_on: tuple[str, ...] | None

    @classmethod
    def of(
        cls,
        selection: CheckpointSelection,
        dataset: TrainingData,
        val_dataset: TrainingData | None,
        note: str,
        continued: bool,
    ) -> RunVerdict:
        """The verdict on what a selection keeps.

        Args:
            selection: After training.
            dataset: Training data.
            val_dataset: Validation data; None if nothing was evaluated.
            note: Where the validation data comes from.
            continued: Whether the run started from an adapter instead of the base.
        """
        start = "the adapter that it continues" if continued else "the base"
        trained_on = tuple(dataset.origins()) if dataset.kind == "queries" else None
        reference, kept, installed, base = selection.reference, selection.kept, selection.installed, selection.base
        if val_dataset is None or reference is None or kept is None or base is None:
            summary = (
                f"{Verdict.NOT_EVALUATED.value}: there was no validation set, so it is not known whether this model is "
                "better."
            )
            return cls(summary, None, None, {}, trained_on)
        change = None
        if installed is not None:
            alone = compare(reference, base, trained_on=())  # type: ignore[arg-type]
            change = BaseChange(f"base, {installed.change}", base.metrics, alone)
        if selection.best_step == 0 and not selection.keeps_installed:
            trained_on = None if trained_on is None else ()
        shared = trained_note(dataset, val_dataset)
        comparison = compare(reference, kept, trained_on=trained_on, note=shared)  # type: ignore[arg-type]
        metrics = {"base": reference.metrics, "tuned": kept.metrics}
        if change is not None:
            metrics = {"base": reference.metrics, change.name: change.metrics, "tuned": kept.metrics}
        if selection.best_step:
            chosen_on = None if selection.subset is None else len(selection.subset["queries"])
            note = _about_trained(len(selection.history), note, continued, chosen_on)
            return cls(f"{comparison} {note}".strip(), comparison, change, metrics, trained_on)
        if installed is not None and not selection.keeps_installed:
            gained = (
                f"Training gained nothing; the adapter gives the vectors of {start} with {installed.change}, which "
                "evaluated better than as installed."
            )
            return cls(f"{comparison} {gained} {note}".strip(), comparison, change, metrics, trained_on)
        own = "" if installed is None else (" as it was saved" if continued else " as installed")
        gained = f"training gained nothing; the adapter gives the vectors of {start}{own}."
        on = f"{comparison.queries} {comparison.evidence.value}"
        summary = f"{comparison.verdict.value} on {on}: {gained} {comparison.basis} {note}".strip()
        return cls(summary, comparison, change, metrics, trained_on)


def _about_trained(evaluations: int, note: str, continued: bool, chosen_on: int | None) -> str:
    """What a reader must know about the verdict on a trained step.

    Args:
        evaluations: Number of evaluations to choose the best from, that of step 0 included.
        note: Where the validation data comes from.
        continued: Whether the run started from an adapter.
        chosen_on: Number of queries on which the best was chosen; None for all.
    """
    if continued:
        note = f"Compared with the adapter that it continues, not with the base. {note}".strip()
    if evaluations > 2:
        # a maximum over several looks at the same questions is a little too high
        some = "" if chosen_on is None else f"{chosen_on} of "
        note = f"{note} The best of {evaluations - 1} evaluations was chosen on {some}these same questions.".strip()
    return note
