"""A registered version of a model, and two of them side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_index_lora_embed.core.errors import AdapterError
from llama_index_lora_embed.evaluation.compare import Difference
from llama_index_lora_embed.models.adapter_directory import Manifest


@dataclass(frozen=True)
class Version:
    """A registered version.

    Attributes:
        name: Unique in the registry.
        path: Adapter directory when it was registered.
        fingerprint: Fingerprint of the model.
        created: When it was trained; UTC, ISO 8601.
        added: When it was registered; UTC, ISO 8601.
        base: Hub id or folder of the base model.
        trained_on: Digest of the training set.
        verdict: The verdict of its run, in one sentence.
        metrics: Means on `evaluated_on`; empty if it was not evaluated.
        evaluated_on: Digest of the evaluation dataset; None if it was not evaluated.
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
    evaluated_on: str | None = None

    @property
    def status(self) -> str:
        """What its directory holds now: "there", "replaced" (another model) or "gone"."""
        try:
            manifest = Manifest.read(Path(self.path))
        except AdapterError:
            return "replaced"
        if manifest is None:
            return "gone"
        return "there" if manifest.fingerprint == self.fingerprint else "replaced"


@dataclass(frozen=True)
class VersionComparison:
    """Two versions side by side.

    Attributes:
        before: The first version.
        after: The second version.
        changed: How their training differs: setting to (before, after).
        metrics: Differences on the same queries, after minus before; None if they were evaluated on different datasets.
    """

    before: Version
    after: Version
    changed: dict[str, tuple[Any, Any]]
    metrics: dict[str, Difference] | None

    def __str__(self) -> str:
        lines = [f"{self.before.name} ({self.before.created}) against {self.after.name} ({self.after.created})"]
        lines += [f"  {name}: {old!r} -> {new!r}" for name, (old, new) in self.changed.items()]
        if self.metrics is None:
            return "\n".join([*lines, "  evaluated on different datasets, so that their metrics cannot be compared"])
        for name, m in self.metrics.items():
            low, high = m.interval
            lines.append(f"  {name}: {m.base:.3f} -> {m.tuned:.3f}, {m.difference:+.3f} ({low:+.3f} to {high:+.3f})")
        return "\n".join(lines)


def check_not_replaced(version: Version) -> None:
    """Raise `AdapterError` where the version's directory holds another model by now."""
    if version.status == "replaced":
        raise AdapterError(
            f"{version.path!r}, which holds another model than {version.name} by now",
            f"the model with the fingerprint {version.fingerprint[:12]}...",
            "Train each version into its own directory; the model that is there now can be added as a new version.",
        )


def training_of(version: Version) -> dict[str, Any]:
    """How a version was trained, setting by setting, as far as its directory still tells."""
    found: dict[str, Any] = {"base": version.base, "trained on": version.trained_on[:8]}
    manifest = Manifest.read(Path(version.path)) if version.status == "there" else None
    if manifest is not None:
        found["max_seq_length"] = manifest.max_seq_length
        for part in ("settings", "lora", "versions"):
            found |= _flatten(part, getattr(manifest, part))
    return found


def _flatten(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for child in value for key, leaf in _flatten(f"{name}.{child}", value[child]).items()}
