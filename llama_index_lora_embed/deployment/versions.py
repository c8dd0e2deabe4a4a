"""A version in the registry, two of them compared, and the gate's answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_index_lora_embed.core.errors import AdapterError
from llama_index_lora_embed.evaluation.retrieval_comparison import Difference
from llama_index_lora_embed.models.adapter_directory import Manifest


@dataclass(frozen=True)
class Version:
    """A line of the index.

    Attributes:
        name: Unique in the registry.
        path: Adapter directory at that time.
        fingerprint: Of the model.
        created: When it was trained; UTC, ISO 8601.
        added: When it was registered; UTC, ISO 8601.
        base: Hub id or folder of the base.
        trained_on: Digest of the training set.
        verdict: The run's own, in one sentence.
        metrics: Means on `judged_on`; empty if it was not evaluated.
        judged_on: Digest of the dataset; None if it was not evaluated.
    """

    name: str
    path: str
    fingerprint: str
    created: str
    added: str
    base: str
    trained_on: str
    verdict: str
    metrics: dict[str, float] = field(default_factory=dict)
    judged_on: str | None = None

    @property
    def status(self) -> str:
        """What is in its directory now: "there", "replaced" (by another model) or "gone"."""
        try:
            manifest = Manifest.read(Path(self.path))
        except AdapterError:
            return "replaced"
        if manifest is None:
            return "gone"
        return "there" if manifest.fingerprint == self.fingerprint else "replaced"


@dataclass(frozen=True)
class VersionComparison:
    """Two versions beside each other.

    Attributes:
        before: The one.
        after: The other.
        changed: What differs in how they were made: setting to (before, after).
        measures: Differences on the same questions, after minus before; None if they were judged on different ones.
    """

    before: Version
    after: Version
    changed: dict[str, tuple[Any, Any]]
    measures: dict[str, Difference] | None

    def __str__(self) -> str:
        lines = [f"{self.before.name} ({self.before.created}) against {self.after.name} ({self.after.created})"]
        lines += [f"  {name}: {old!r} -> {new!r}" for name, (old, new) in self.changed.items()]
        if self.measures is None:
            return "\n".join([*lines, "  not judged on the same questions, so that their measures cannot be compared"])
        for name, m in self.measures.items():
            low, high = m.interval
            lines.append(f"  {name}: {m.base:.3f} -> {m.tuned:.3f}, {m.difference:+.3f} ({low:+.3f} to {high:+.3f})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Gate:
    """Whether a version is no worse than the one in use; true if it is not.

    Attributes:
        passed: No part of the 95 % interval of the difference lies below -tolerance, and there are enough questions;
            or nothing is in use yet.
        reason: In one sentence.
        measured: nDCG@10 of both; None if nothing is in use.
    """

    passed: bool
    reason: str
    measured: Difference | None = None

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return f"{'PASSED' if self.passed else 'NOT PASSED'}: {self.reason}"
