"""Versions of a model over time: an index that only grows, over the manifests of the runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.config.base import is_share
from llama_index_lora_embed.core.errors import AdapterError, ConfigError, DatasetError, OutputDirectoryError
from llama_index_lora_embed.core.files import write_json
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.deployment.versions import Gate, Version, VersionComparison
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding
from llama_index_lora_embed.evaluation.report.run_facts import RunFacts
from llama_index_lora_embed.evaluation.report.tables import Table
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval, judged_digest
from llama_index_lora_embed.evaluation.retrieval_comparison import differences
from llama_index_lora_embed.evaluation.significance import FEWEST, paired_intervals
from llama_index_lora_embed.models.adapter_directory import Manifest

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from matplotlib.figure import Figure

_INDEX = "versions.jsonl"
_EVALUATIONS = "evaluations"
_METRIC = "ndcg@10"
TOLERANCE = 0.01
"""nDCG@10 that the gate gives away: an interval has a width, so that with 0 only a clear gain would pass."""


Versions = list[Version]


class RunRegistry:
    """A folder that remembers versions, what they were judged by, and which one is in use.

    Its index only grows: lines are appended under a lock and synced, and a line that a kill cut short is passed over.

    Args:
        path: The folder; made when the first version is added.

    Example:
        >>> registry = RunRegistry("runs/registry")  # doctest: +SKIP
        >>> registry.add("runs/handbook", dataset=val)  # doctest: +SKIP
        >>> if registry.gate("v2"):  # doctest: +SKIP
        ...     registry.use("v2")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self._index = self.path / _INDEX

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
            adapter_path: What a run has written.
            dataset: What to judge it by; the same one for all versions, so that they can be compared.
            evaluation: Of the model on this dataset; None evaluates it now.
            embed_model: What to evaluate it with; None for `LoraEmbedding(adapter_path)`.
            name: Letters, digits, ".", "_" and "-"; None counts on: v1, v2, ...

        Raises:
            AdapterError: There is no manifest, or a damaged one.
            ConfigError: The name is taken or not allowed, or there is an evaluation without a dataset.
            DatasetError: The evaluation is of other queries.
            OutputDirectoryError: The registry cannot be written.
        """
        manifest = RunFacts.read(adapter_path).manifest
        if evaluation is not None and dataset is None:
            raise ConfigError("an evaluation without its dataset", "both", "add(path, dataset=val, evaluation=...)")
        if name is not None and (not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name)):
            raise ConfigError(f"name={name!r}", "letters, digits, '.', '_' and '-'", "name='2026-11-handbook'")
        self._check_new(name)
        judged_on = None
        if dataset is not None:
            dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
            judged_on = judged_digest(dataset)
            if evaluation is None:
                evaluation = evaluate_retrieval(embed_model or LoraEmbedding(adapter_path), dataset)
            elif evaluation.per_query.keys() != dataset.queries.keys() or evaluation.digest not in ("", judged_on):
                raise DatasetError(
                    "an evaluation of other queries or passages than the dataset's",
                    "one of this dataset",
                    "Evaluate it again.",
                )
        with self._locked():
            self._check_new(name)
            versions = self.list()
            taken = {version.name.lower() for version in versions}  # some file systems know no capitals
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
                judged_on=judged_on,
            )
            if evaluation is not None:
                self._keep(version, evaluation)
            self._append({"event": "add", **asdict(version)})
        return version

    def list(self) -> Versions:
        """All versions, the oldest first."""
        known = {field.name for field in fields(Version)}  # a newer version of this package may write more
        return [Version(**{k: v for k, v in e.items() if k in known}) for e in self._events() if e["event"] == "add"]

    def show(self, name: str) -> str:
        """A version in words: what it is, what it was trained on, its measures, and whether it is still there."""
        version = self._find(name)
        used = self.in_use()
        rows = [(key.replace("_", " "), str(value)) for key, value in asdict(version).items() if key != "metrics"]
        rows.append(("in use", "yes" if used is not None and used.name == name else "no"))
        rows.append(("directory", version.status))
        rows += [(metric, f"{value:.3f}") for metric, value in version.metrics.items()]
        width = max(len(key) for key, _ in rows)
        return "\n".join(f"{key:{width}}  {value}" for key, value in rows)

    def table(self) -> Table:
        """All versions with their measures."""
        used = self.in_use()
        rows = [
            (
                v.name + (" (in use)" if used is not None and v.name == used.name else ""),
                v.created,
                Path(v.base).name,
                (v.judged_on or "")[:8],
                *(f"{v.metrics[m]:.3f}" if m in v.metrics else "" for m in ("hit@5", _METRIC)),
                v.status,
            )
            for v in self.list()
        ]
        columns = ("version", "trained", "base", "judged on", "hit@5", "nDCG@10", "directory")
        return Table("Versions", columns, rows, texts=("trained", "base", "judged on", "directory"))

    def compare(self, before: str, after: str) -> VersionComparison:
        """What changed between two versions, and what came of it.

        Raises:
            ConfigError: A name is unknown.
            DatasetError: An evaluation cannot be read.
        """
        one, other = self._find(before), self._find(after)
        made = [self._made(version) for version in (one, other)]
        keys = dict.fromkeys([*made[0], *made[1]])
        changed = {k: (made[0].get(k), made[1].get(k)) for k in keys if made[0].get(k) != made[1].get(k)}
        measures = None
        if one.judged_on is not None and one.judged_on == other.judged_on:
            measures = differences(self._evaluation(one), self._evaluation(other))
        return VersionComparison(one, other, changed, measures)

    def trend(self, metric: str = _METRIC) -> Figure:
        """A picture of a measure over the versions that were judged on the dataset of the last one.

        Raises:
            ConfigError: No version was evaluated, or not by this measure.
            MissingExtraError: The extra "report" is not installed.
        """
        from llama_index_lora_embed.evaluation.report import plots

        judged = [version for version in self.list() if metric in version.metrics]
        if not judged:
            raise ConfigError(
                f"no version with {metric}", "one that was added with a dataset", "registry.add(path, dataset=val)"
            )
        points = []
        for version in judged:
            if version.judged_on == judged[-1].judged_on:
                values = np.array(self._evaluation(version).scores(metric))
                points.append((version.name, float(values.mean()), paired_intervals(values[:, None])[0]))
        return plots.trend(points, metric)

    def in_use(self) -> Version | None:
        """The version that `use` named last; None if none was."""
        names = [event["name"] for event in self._events() if event["event"] == "use"]
        return self._find(names[-1]) if names else None

    def use(self, name: str) -> None:
        """Note that a version is in use now.

        Raises:
            AdapterError: Its directory holds another model by now.
            ConfigError: The name is unknown.
            OutputDirectoryError: The registry cannot be written.
        """
        self._check_there(self._find(name))
        with self._locked():
            self._append({"event": "use", "name": name, "time": _now()})

    def gate(self, name: str, *, tolerance: float = TOLERANCE) -> Gate:
        """Whether a version is no worse than the one in use, on the same questions.

        A test of non-inferiority: the lower end of the 95 % interval of the difference of nDCG@10 must not lie below
        -tolerance. Few questions have wide intervals, so that little passes on them but a clear gain, and on fewer than
        ten nothing does.

        Args:
            name: The candidate.
            tolerance: What may be lost, 0 to 1.

        Raises:
            AdapterError: The candidate's directory holds another model by now.
            ConfigError: The name is unknown, or tolerance no number from 0 to 1.
            DatasetError: The two were not judged on the same dataset.
        """
        if not is_share(tolerance):
            raise ConfigError(f"tolerance={tolerance!r}", "a number from 0 to 1", f"tolerance={TOLERANCE}")
        candidate, used = self._find(name), self.in_use()
        self._check_there(candidate)
        if used is None:
            return Gate(True, "no version is in use yet")
        if candidate.judged_on is None or candidate.judged_on != used.judged_on:
            raise DatasetError(
                f"{name!r} judged on {(candidate.judged_on or 'nothing')[:8]} and {used.name!r}, which is in use, on "
                f"{(used.judged_on or 'nothing')[:8]}",
                "both judged on one dataset",
                "Add both with the same dataset=.",
            )
        found = differences(self._evaluation(used), self._evaluation(candidate), names=[_METRIC])[_METRIC]
        low, high = found.interval
        count = len(self._evaluation(candidate).per_query)
        if count < FEWEST:
            return Gate(False, f"{count} questions are too few to tell; have {FEWEST} or more", found)
        return Gate(
            low >= -tolerance,
            f"nDCG@10 of {name} is {found.difference:+.3f} (95 % interval {low:+.3f} to {high:+.3f}) beside "
            f"{used.name}, which is in use; at most {tolerance:.3f} may be lost",
            found,
        )

    def _check_new(self, name: str | None) -> None:
        if name is not None and name.lower() in {version.name.lower() for version in self.list()}:
            raise ConfigError(f"name={name!r}, which is taken", "a new name", "Leave name=None to count on.")

    def _check_there(self, version: Version) -> None:
        if version.status == "replaced":
            raise AdapterError(
                f"{version.path!r}, which holds another model than {version.name} by now",
                f"the model with the fingerprint {version.fingerprint[:12]}...",
                "Train versions into directories of their own; what is there now can be added as a new version.",
            )

    def _made(self, version: Version) -> dict[str, Any]:
        """How a version was made, as far as its directory still tells."""
        found: dict[str, Any] = {"base": version.base, "trained on": version.trained_on[:8]}
        manifest = Manifest.read(Path(version.path)) if version.status == "there" else None
        if manifest is not None:
            found |= {f"settings.{k}": v for k, v in manifest.settings.items()}
            found |= {f"lora.{k}": v for k, v in manifest.lora.items()}
            found |= {
                "max_seq_length": manifest.max_seq_length,
                **{f"versions.{k}": v for k, v in manifest.versions.items()},
            }
        return found

    def _find(self, name: str) -> Version:
        versions = self.list()
        for version in versions:
            if version.name == name:
                return version
        known = ", ".join(version.name for version in versions) or "none yet"
        raise ConfigError(f"version {name!r}", f"one of: {known}", "registry.list() has them all.")

    def _keep(self, version: Version, evaluation: RetrievalEvaluation) -> None:
        held = {"per_query": evaluation.per_query, "origins": evaluation.origins, "passages": evaluation.passages}
        try:
            write_json(self.path / _EVALUATIONS / f"{version.name}.json", held)
        except OSError as error:
            raise self._unwritable(error) from error

    def _evaluation(self, version: Version) -> RetrievalEvaluation:
        file = self.path / _EVALUATIONS / f"{version.name}.json"
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            return RetrievalEvaluation(version.metrics, held["per_query"], {}, held["origins"], held["passages"])
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(
                f"an evaluation of {version.name} that cannot be read ({error})",
                str(file),
                "Add the version again under another name.",
            ) from error

    def _events(self) -> Iterator[dict[str, Any]]:
        try:
            text = self._index.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unwritable(error) from error
        for line in text.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut short by a kill
            if isinstance(event, dict) and "event" in event:
                yield event

    def _append(self, event: dict[str, Any]) -> None:
        with open(self._index, "a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # what a kill left
                    file.write(b"\n")
            file.write(json.dumps(event).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / f"{_INDEX}.lock"):
                yield
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> OutputDirectoryError:
        return OutputDirectoryError(
            f"a registry {str(self.path)!r} that cannot be written ({error})",
            "a folder that can be written",
            "Change its permissions, or name another folder.",
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
