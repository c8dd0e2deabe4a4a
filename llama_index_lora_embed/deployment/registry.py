"""A registry of the versions of a model: an append-only index over the manifests of their runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.config import VERSIONS_NAME
from llama_index_lora_embed.config.base import is_share
from llama_index_lora_embed.core.errors import AdapterError, ConfigError, DatasetError, OutputDirectoryError
from llama_index_lora_embed.core.files import append_json_line, read_json_lines, write_json
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.origins import origin_name
from llama_index_lora_embed.deployment.versions import Version, VersionComparison, check_not_replaced, training_of
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding
from llama_index_lora_embed.evaluation.compare import compare, metric_differences
from llama_index_lora_embed.evaluation.report.run_facts import RunFacts
from llama_index_lora_embed.evaluation.report.tables import Table
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval, evaluation_digest
from llama_index_lora_embed.evaluation.significance import paired_intervals
from llama_index_lora_embed.evaluation.verdict import TOLERANCE, Comparison

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from matplotlib.figure import Figure

_EVALUATIONS = "evaluations"
_METRIC = "ndcg@10"
_OLD_NAMES = {"judged_on": "evaluated_on"}  # keys of registries from before version 0.1


@dataclass(frozen=True)
class Gate:
    """Whether a version is no worse than the promoted one; true if so.

    Attributes:
        passed: `Comparison.accepts`, or no version is promoted yet.
        reason: In words.
        comparison: Of the promoted version and the candidate; None if no version is promoted.
    """

    passed: bool
    reason: str
    comparison: Comparison | None = None

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return f"{'PASSED' if self.passed else 'NOT PASSED'}: {self.reason}"


Versions = list[Version]  # within the class, `list` is its method
Names = list[str]


class RunRegistry:
    """A folder that records versions, their metrics, and which one is promoted.

    The index is append-only: lines are added under a lock and synced, and a line that was cut short is skipped.

    Args:
        path: The folder; created with the first version.

    Example:
        >>> registry = RunRegistry("runs/registry")  # doctest: +SKIP
        >>> registry.add("runs/handbook", dataset=val)  # doctest: +SKIP
        >>> if registry.gate("v2"):  # doctest: +SKIP
        ...     registry.promote("v2")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self._index = self.path / VERSIONS_NAME

    def add(
        self,
        adapter_path: str | os.PathLike[str],
        *,
        dataset: EmbeddingQAFinetuneDataset | None = None,
        evaluation: RetrievalEvaluation | None = None,
        embed_model: BaseEmbedding | None = None,
        name: str | None = None,
    ) -> Version:
        """Register the model in an adapter directory.

        Args:
            adapter_path: Output directory of a run.
            dataset: Evaluation dataset; use the same one for all versions, so that they can be compared.
            evaluation: Evaluation of the model on this dataset; None evaluates it now.
            embed_model: The model to evaluate; None for `LoraEmbedding(adapter_path)`.
            name: Letters, digits, ".", "_" and "-"; None for v1, v2, ...

        Raises:
            AdapterError: The manifest is missing or damaged.
            ConfigError: The name is taken or not allowed, there is an evaluation without a dataset, or an embedding
                adapter without its model.
            DatasetError: The evaluation comes from another dataset.
            OutputDirectoryError: The registry cannot be written.
        """
        manifest = RunFacts.read(adapter_path).manifest
        if evaluation is not None and dataset is None:
            raise ConfigError("an evaluation without its dataset", "both", "add(path, dataset=val, evaluation=...)")
        if name is not None and (not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name)):
            raise ConfigError(f"name={name!r}", "letters, digits, '.', '_' and '-'", "name='2026-11-handbook'")
        self._check_new(name)
        if manifest.embedding_adapter and dataset is not None and evaluation is None and embed_model is None:
            raise ConfigError(
                f"{str(adapter_path)!r} with an embedding adapter, which needs the embedding model below it",
                "the embedding model with the adapter",
                "add(path, dataset=val, embed_model=AdapterEmbeddingModel(base_embed_model, path))",
            )
        digest = None
        if dataset is not None:
            dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
            digest = evaluation_digest(dataset)
            if evaluation is None:
                evaluation = evaluate_retrieval(embed_model or LoraEmbedding(adapter_path), dataset)
            elif evaluation.per_query.keys() != dataset.queries.keys() or evaluation.digest not in ("", digest):
                raise DatasetError(
                    "an evaluation of other queries or passages than the dataset's",
                    "an evaluation of this dataset",
                    "Evaluate the model again.",
                )
        with self._locked():
            self._check_new(name)
            versions = self.list()
            taken = {version.name.lower() for version in versions}  # some file systems ignore case
            number = len(versions) + 1
            while name is None or name in taken:
                name, number = f"v{number}", number + 1
            version = Version(
                name=name,
                path=str(Path(adapter_path).expanduser().absolute()),
                fingerprint=manifest.fingerprint,
                created=manifest.created,
                added=_now(),
                base=str(manifest.base.get("model_id", "")),
                trained_on=str(manifest.dataset.get("digest", "")),
                verdict=manifest.verdict,
                metrics={} if evaluation is None else evaluation.metrics,
                evaluated_on=digest,
            )
            if evaluation is not None:
                self._save_evaluation(version, evaluation)
            append_json_line(self._index, {"event": "add", **asdict(version)})
        return version

    def list(self) -> Versions:
        """All versions, oldest first."""
        known = {field.name for field in fields(Version)}  # a later release may write more
        events = [{_OLD_NAMES.get(k, k): v for k, v in e.items()} for e in self._events() if e["event"] == "add"]
        return [Version(**{k: v for k, v in event.items() if k in known}) for event in events]

    def show(self, name: str) -> str:
        """A version as text: its model, training set, metrics, and whether its directory still holds it.

        Raises:
            ConfigError: The name is unknown.
        """
        version, promoted = self._find(name), self.promoted()
        rows = [(key.replace("_", " "), str(value)) for key, value in asdict(version).items() if key != "metrics"]
        rows.append(("promoted", "yes" if promoted is not None and promoted.name == name else "no"))
        rows.append(("directory", version.status))
        rows += [(metric, f"{value:.3f}") for metric, value in version.metrics.items()]
        width = max(len(key) for key, _ in rows)
        return "\n".join(f"{key:{width}}  {value}" for key, value in rows)

    def table(self) -> Table:
        """All versions with their metrics."""
        promoted = self.promoted()
        rows = [
            (
                v.name + (" (promoted)" if promoted is not None and v.name == promoted.name else ""),
                v.created,
                Path(v.base).name,
                (v.evaluated_on or "")[:8],
                *(f"{v.metrics[m]:.3f}" if m in v.metrics else "" for m in ("hit@5", _METRIC)),
                v.status,
            )
            for v in self.list()
        ]
        columns = ("version", "trained", "base", "evaluated on", "hit@5", "nDCG@10", "directory")
        return Table("Versions", columns, rows, text_columns=("trained", "base", "evaluated on", "directory"))

    def compare(self, before: str, after: str) -> VersionComparison:
        """Compare the training and, if they were evaluated on the same dataset, the metrics of two versions.

        Raises:
            ConfigError: A name is unknown.
            DatasetError: An evaluation cannot be read.
        """
        versions = self._find(before), self._find(after)
        old, new = map(training_of, versions)
        changed = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
        metrics = None
        if versions[0].evaluated_on is not None and versions[0].evaluated_on == versions[1].evaluated_on:
            metrics = metric_differences(self._load_evaluation(versions[0]), self._load_evaluation(versions[1]))
        return VersionComparison(*versions, changed, metrics)

    def trend(self, metric: str = _METRIC) -> Figure:
        """A chart of a metric over the versions that were evaluated on the dataset of the latest one.

        Raises:
            ConfigError: No version was evaluated by this metric.
            MissingExtraError: The extra "report" is not installed.
        """
        from llama_index_lora_embed.evaluation.report import plots

        evaluated = [version for version in self.list() if metric in version.metrics]
        if not evaluated:
            raise ConfigError(
                f"no version with {metric}",
                "a version that was added with a dataset",
                "registry.add(path, dataset=val)",
            )
        points = []
        for version in evaluated:
            if version.evaluated_on == evaluated[-1].evaluated_on:
                values = np.array(self._load_evaluation(version).scores(metric))
                points.append((version.name, float(values.mean()), paired_intervals(values[:, None])[0]))
        return plots.trend(points, metric)

    def promoted(self) -> Version | None:
        """The version that was promoted last; None if none was."""
        names = self._promotions()
        return self._find(names[-1]) if names else None

    def _promotions(self) -> Names:
        """Names in the order in which they were promoted."""
        # "use" is what registries from before version 0.1 hold
        return [event["name"] for event in self._events() if event["event"] in ("promote", "use")]

    def promote(self, name: str) -> None:
        """Record that a version is in use now.

        Raises:
            AdapterError: Its directory holds another model by now.
            ConfigError: The name is unknown.
            OutputDirectoryError: The registry cannot be written.
        """
        check_not_replaced(self._find(name))
        with self._locked():
            append_json_line(self._index, {"event": "promote", "name": name, "time": _now()})

    def roll_back(self) -> Version:
        """Promote the version that was promoted before; a second call undoes the first.

        Returns:
            The version that is promoted now.

        Raises:
            AdapterError: Its directory holds another model by now.
            ConfigError: No other version was promoted before.
            OutputDirectoryError: The registry cannot be written.
        """
        names = self._promotions()
        before = next((name for name in reversed(names) if name != names[-1]), None)
        if before is None:
            raise ConfigError(
                "a registry without an earlier promoted version", "two promoted versions", "promote(name) promotes one."
            )
        self.promote(before)
        return self._find(before)

    def gate(self, name: str, *, tolerance: float = TOLERANCE) -> Gate:
        """Whether a version is no worse than the promoted one on the same queries.

        A test of non-inferiority (`Comparison.accepts`): the lower end of the 95 % interval of the difference of
        nDCG@10 must be at least -tolerance. With few queries the interval is wide, so that only a clear gain passes;
        with fewer than ten nothing does, and on synthetic queries only LIKELY BETTER.

        Args:
            name: The candidate.
            tolerance: Accepted loss, 0 to 1.

        Raises:
            AdapterError: The candidate's directory holds another model by now.
            ConfigError: The name is unknown, or tolerance is not a number from 0 to 1.
            DatasetError: The two were not evaluated on the same dataset.
        """
        if not is_share(tolerance):
            raise ConfigError(f"tolerance={tolerance!r}", "a number from 0 to 1", f"tolerance={TOLERANCE}")
        candidate, promoted = self._find(name), self.promoted()
        check_not_replaced(candidate)
        if promoted is None:
            return Gate(True, "no version is promoted yet")
        if candidate.evaluated_on is None or candidate.evaluated_on != promoted.evaluated_on:
            raise DatasetError(
                f"{name!r} evaluated on {(candidate.evaluated_on or 'nothing')[:8]}, and the promoted version "
                f"{promoted.name!r} on {(promoted.evaluated_on or 'nothing')[:8]}",
                "both evaluated on the same dataset",
                "Add both with the same dataset=.",
            )
        old, new = self._load_evaluation(promoted), self._load_evaluation(candidate)
        try:
            trained_on = RunFacts.read(candidate.path).manifest.trained_on
        except AdapterError:  # its directory is gone, but its evaluation is here
            trained_on = None
        comparison = compare(old, new, trained_on=trained_on)
        return Gate(
            comparison.accepts(tolerance),
            f"{name} against the promoted version {promoted.name}: {comparison} The accepted loss is {tolerance:.3f}.",
            comparison,
        )

    def _check_new(self, name: str | None) -> None:
        if name is not None and name.lower() in {version.name.lower() for version in self.list()}:
            raise ConfigError(f"name={name!r}, which is taken", "a new name", "name=None numbers versions.")

    def _find(self, name: str) -> Version:
        versions = self.list()
        for version in versions:
            if version.name == name:
                return version
        known = ", ".join(version.name for version in versions) or "none yet"
        raise ConfigError(f"version {name!r}", f"one of: {known}", "registry.list() returns all versions.")

    def _save_evaluation(self, version: Version, evaluation: RetrievalEvaluation) -> None:
        saved = {
            "per_query": evaluation.per_query,
            "origins": evaluation.origins,
            "passages": evaluation.passages,
            "query_origins": evaluation.query_origins,
        }
        try:
            write_json(self.path / _EVALUATIONS / f"{version.name}.json", saved)
        except OSError as error:
            raise self._unwritable(error) from error

    def _load_evaluation(self, version: Version) -> RetrievalEvaluation:
        file = self.path / _EVALUATIONS / f"{version.name}.json"
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            origins = {origin_name(origin): count for origin, count in saved["origins"].items()}
            return RetrievalEvaluation(
                version.metrics,
                saved["per_query"],
                {},
                origins,
                saved["passages"],
                # where every query has the same origin, a registry without the single ones knows it, too
                query_origins=saved.get("query_origins")
                or (dict.fromkeys(saved["per_query"], *origins) if len(origins) == 1 else {}),
            )
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(
                f"an evaluation of {version.name} that cannot be read ({error})",
                str(file),
                "Add the version again under another name.",
            ) from error

    def _events(self) -> Iterator[dict[str, Any]]:
        try:
            return (event for event in read_json_lines(self._index) if "event" in event)
        except FileNotFoundError:
            return iter(())
        except OSError as error:
            raise self._unwritable(error) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / f"{VERSIONS_NAME}.lock"):
                yield
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> OutputDirectoryError:
        return OutputDirectoryError(
            f"a registry {str(self.path)!r} that cannot be written ({error})",
            "a writable folder",
            "Change its permissions, or choose another folder.",
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
