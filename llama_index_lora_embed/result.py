"""What `finetune()` gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index_lora_embed.data import BuildReport
    from llama_index_lora_embed.evaluation import Comparison, Verdict
    from llama_index_lora_embed.training.lengths import Truncation


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune()` gives back; print it.

    Attributes:
        adapter_path: The adapter directory.
        fingerprint: Of the model in it.
        verdict: BETTER, NO CLEAR DIFFERENCE, WORSE or NOT EVALUATED.
        summary: The verdict in one sentence, with the questions that it rests on.
        base_metrics: Measures of the base on the validation questions, from 0 to 1; empty if not evaluated.
        tuned_metrics: Measures of what was written.
        comparison: The difference with its interval; None if not evaluated.
        best_step: Step of the weights that were written; 0 means that training gained nothing.
        steps: Steps taken.
        history: Step and measures of every evaluation.
        truncation: Which length was chosen and how many texts are cut.
        train_seconds: Wall time of training, evaluations not counted.
        precision: "bf16" or "fp32".
        data_report: What became of the nodes; None if a dataset was passed.
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
    truncation: Truncation
    train_seconds: float
    precision: str
    data_report: BuildReport | None = None

    @property
    def max_seq_length(self) -> int:
        """Tokens per text, in training and when embedding."""
        return self.truncation.length_after

    def __str__(self) -> str:
        lines = [self.summary]
        if self.base_metrics:
            lines.append(f"{'':8}" + "".join(f"{name:>11}" for name in self.base_metrics))
            for row, values in (("base", self.base_metrics), ("tuned", self.tuned_metrics)):
                lines.append(f"{row:8}" + "".join(f"{value:11.3f}" for value in values.values()))
        lines.append(f"{self.truncation}")
        lines.append(f"adapter of step {self.best_step} of {self.steps} in {self.adapter_path}")
        return "\n".join(lines)


def summarise(comparison: Comparison | None, best_step: int, evaluations: int, note: str = "") -> str:
    """The verdict in words.

    Args:
        comparison: None if nothing was evaluated.
        best_step: 0 if no step beat the base.
        evaluations: How many there were to choose the best from, the base's included.
        note: Where the validation questions come from.
    """
    if comparison is None:
        return "NOT EVALUATED: there was no validation set, so nobody knows whether this model is better."
    if best_step == 0:
        gained_nothing = "training gained nothing; what was written gives the base's own vectors."
        return f"{comparison.verdict.value}: {gained_nothing} {comparison.basis} {note}".strip()
    if evaluations > 2:
        # a maximum over several looks at the same questions is a little too high
        note = f"{note} The best of {evaluations - 1} evaluations was chosen on these same questions.".strip()
    return f"{comparison} {note}".strip()
