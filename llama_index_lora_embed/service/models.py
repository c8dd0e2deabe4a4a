"""The names of models: base models of the allow-list, models of jobs, and adapters with versions."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sqlmodel import col, select

from llama_index_lora_embed.config import VERSIONS_NAME
from llama_index_lora_embed.core.files import absolute
from llama_index_lora_embed.service.checkpoints import open_checkpoint
from llama_index_lora_embed.service.database import new_id
from llama_index_lora_embed.service.embedding import ServedModel, Side
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.jobs.state import JobState, ModelDeleted
from llama_index_lora_embed.service.jobs.tables import JobRow

if TYPE_CHECKING:
    from llama_index_lora_embed.deployment import RunRegistry
    from llama_index_lora_embed.deployment.versions import Version
    from llama_index_lora_embed.service.services import Services

_JOB = "ftjob-"
_SHORT = 8  # characters of a job's id in the name of its model
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIDES: dict[str, Side] = {"-query": "query", "-passage": "passage"}
_PAGE = 500
_KNOWN_S, _MOST_KNOWN = 1.0, 1000  # for which a job that was found is not looked up again
_CHECKPOINT = re.compile(r"(?P<model>.+):ckpt-step-(?P<step>[0-9]{1,9})")


@dataclass(frozen=True)
class ModelCard:
    """A model in lists.

    Attributes:
        name: What requests call it.
        created: Seconds since 1970; 0 for a base model.
        parent: Name of the base model of an adapter; None for a base model.
    """

    name: str
    created: int = 0
    parent: str | None = None


def fine_tuned_model(job: JobState) -> str:
    """The name of a job's model: "ft:<base>:<suffix>:<id>", with nothing between two colons without a suffix."""
    return f"ft:{job.spec.model}:{job.spec.suffix or ''}:{job.id.removeprefix(_JOB)[:_SHORT]}"


def side_of(name: str) -> tuple[str, Side | None]:
    """A name without "-query" or "-passage" at its end, and which of the two it was.

    Clients that cannot send `input_type` append it to the name.
    """
    for end, side in _SIDES.items():
        if name.endswith(end):
            return name.removesuffix(end), side
    return name, None


class Models:
    """What names of models stand for, by owner.

    A job's model is the job's owner's alone; "<model>:ckpt-step-<step>" is one of its checkpoints. An adapter is for
    every token: "<adapter>" is the version in use, "<adapter>@<version>" any version.

    Args:
        services: Settings, and the store of jobs.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._settings = services.settings
        self._jobs: dict[str, tuple[JobState, float]] = {}  # by names that were asked for, with the time until when
        self._read: dict[str, tuple[tuple[int, int], list[Version], Version | None]] = {}  # by adapter

    def find(self, name: str, owner: str | None) -> ServedModel:
        """What a name stands for.

        Args:
            name: A base model, a job's model or id, a checkpoint of it, an adapter, or a version of one.
            owner: The token that asks; None for one that may see all jobs.

        Raises:
            ServiceError: 404, there is no such model, or it belongs to another owner.
        """
        if name in self._settings.allowed_models:
            return ServedModel(self._settings.allowed_models[name])
        checkpoint = _CHECKPOINT.fullmatch(name)
        if (job := self.job(checkpoint["model"] if checkpoint else name, owner)) is not None:
            base = self._settings.allowed_models.get(job.spec.model)
            if base is not None:
                path = self._settings.models_dir / job.id
                return ServedModel(base, str(open_checkpoint(path, int(checkpoint["step"])) if checkpoint else path))
        elif (version := self._version(name)) is not None:
            base = self._settings.allowed_models.get(self.parent(version) or "")
            if base is not None:
                return ServedModel(base, version.path)
        raise unknown_model(name)

    def job(self, name: str, owner: str | None) -> JobState | None:
        """The job that has made a model, by the model's name or the job's id; None if there is none."""
        short = name.rpartition(":")[2] if name.startswith("ft:") else name.removeprefix(_JOB)
        if not (name.startswith(("ft:", _JOB)) and re.fullmatch(r"[A-Za-z0-9]{8,64}", short)):
            return None
        known, until = self._jobs.get(name, (None, 0.0))
        if known is not None and time.monotonic() < until:
            return known if owner in (None, known.spec.owner) else None
        with self._services.database.read() as session:
            query = select(JobRow).where(JobRow.status == "succeeded", col(JobRow.id).startswith(_JOB + short))
            if owner is not None:
                query = query.where(JobRow.owner == owner)
            rows = session.exec(query).all()
        jobs = [JobState.model_validate_json(row.state) for row in rows]
        found = next((job for job in jobs if job.has_model and name in (job.id, fine_tuned_model(job))), None)
        if found is not None:
            if len(self._jobs) >= _MOST_KNOWN:
                self._jobs.clear()
            self._jobs[name] = found, time.monotonic() + _KNOWN_S
        return found

    def delete_job_model(self, job: JobState) -> None:
        """Delete the model of a job; the job stays.

        Raises:
            ServiceError: 400, it is a version of an adapter.
        """
        used = [
            f"{adapter}@{version.name}"
            for adapter in self.adapters()
            for version in self.versions(adapter)[0]
            if Path(version.path).name == job.id
        ]
        if used:
            raise ServiceError(
                f"a model that is {' and '.join(used)}",
                "a model that is no version of an adapter",
                "Delete the adapter first, or ask the token that it belongs to.",
                code="model_in_use",
                param="model",
            )
        self._services.apply(job.id, ModelDeleted())
        self._jobs.clear()

    def delete_adapter(self, adapter: str) -> None:
        """Delete an adapter with its versions; the models of jobs that they name stay."""
        folder = self.registry(adapter).path
        aside = folder.with_name(new_id(".deleted-"))
        folder.rename(aside)  # at once, for whoever reads it
        shutil.rmtree(aside, ignore_errors=True)

    def registry(self, adapter: str) -> RunRegistry:
        """The versions of an adapter, which may not exist yet.

        Raises:
            ServiceError: 400, the name is not allowed, or is that of a base model.
        """
        from llama_index_lora_embed.deployment import RunRegistry

        if not _ADAPTER.fullmatch(adapter) or adapter in self._settings.allowed_models:
            raise ServiceError(
                f"the name {adapter!r:.80} for an adapter",
                "up to 64 letters, digits, '.', '_' and '-', and not the name of a base model",
                "Choose another name.",
                param="adapter",
            )
        return RunRegistry(self._settings.adapters_dir / adapter)

    def adapters(self) -> list[str]:
        """Names of the adapters that have versions."""
        places = self._settings.adapters_dir.glob(f"*/{VERSIONS_NAME}")
        return sorted(place.parent.name for place in places if _ADAPTER.fullmatch(place.parent.name))

    def versions(self, adapter: str) -> tuple[list[Version], Version | None]:
        """The versions of an adapter, oldest first, and the one in use; read again only where its file has changed."""
        registry = self.registry(adapter)
        stat = (registry.path / VERSIONS_NAME).stat()
        changed = stat.st_mtime_ns, stat.st_size
        if adapter not in self._read or self._read[adapter][0] != changed:
            self._read[adapter] = changed, registry.list(), registry.promoted()
        return self._read[adapter][1:]

    def parent(self, version: Version) -> str | None:
        """The name of the base model of a version; None if it is no longer allowed."""
        places = {absolute(place): name for name, place in self._settings.allowed_models.items()}
        return places.get(version.base)

    def cards(self, owner: str | None) -> Iterator[ModelCard]:
        """The base models, the models of the owner's jobs, newest first, and the adapters with their versions."""
        yield from (ModelCard(name) for name in self._settings.allowed_models)
        after, more = None, True
        while more:
            jobs, more = self._services.jobs.list(owner, after=after, limit=_PAGE, statuses=["succeeded"])
            for job in jobs:
                after = job.id
                if job.has_model and job.spec.model in self._settings.allowed_models:
                    yield ModelCard(fine_tuned_model(job), int(job.ended or job.created), job.spec.model)
        for adapter in self.adapters():
            versions, promoted = self.versions(adapter)
            for version in versions:
                if (parent := self.parent(version)) is not None:
                    added = int(datetime.fromisoformat(version.added).timestamp())
                    yield ModelCard(f"{adapter}@{version.name}", added, parent)
                    if version == promoted:
                        yield ModelCard(adapter, added, parent)

    def _version(self, name: str) -> Version | None:
        adapter, at, wanted = name.partition("@")
        if not _ADAPTER.fullmatch(adapter) or not (self._settings.adapters_dir / adapter / VERSIONS_NAME).is_file():
            return None
        versions, promoted = self.versions(adapter)
        return next((version for version in versions if version.name == wanted), None) if at else promoted


def unknown_model(name: str) -> ServiceError:
    """The error (404) for a name that stands for no model."""
    return ServiceError(
        f"model {name!r:.120}",
        "a base model that this service allows, the model of one of your jobs that has succeeded, or an adapter",
        "GET /v1/models lists them.",
        status=404,
        code="model_not_found",
        param="model",
    )
