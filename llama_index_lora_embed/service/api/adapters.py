"""/v1/adapters: named adapters with versions, one of which is in use; over `deployment.RunRegistry`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from llama_index_lora_embed.service.api.dependencies import Reader, ServicesOf, Trainer
from llama_index_lora_embed.service.api.evaluate import EvaluationData, evaluate_served
from llama_index_lora_embed.service.errors import ServiceError, not_found
from llama_index_lora_embed.service.limits import StrictRoute
from llama_index_lora_embed.service.models import unknown_model
from llama_index_lora_embed.service.security import Caller
from llama_index_lora_embed.service.services import Services

if TYPE_CHECKING:
    from llama_index_lora_embed.deployment import RunRegistry
    from llama_index_lora_embed.deployment.versions import Version

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=StrictRoute)

_OWNER = "owner"  # file with the id of the token that added the first version


class AddVersion(BaseModel):
    """The body of a new version."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str
    """The model of a job that has succeeded, or the job's id."""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """The version's name; v1, v2, ... where there is none."""
    evaluation: EvaluationData | None = None
    """What to evaluate the version on; the same for all versions, so that they can be compared."""


class Promote(BaseModel):
    """The body of a promotion."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    version: str
    """The version to use."""
    gate: bool = False
    """Refuse it unless it is no worse than the version in use, on the same evaluation data."""


@router.get("")
def adapters(caller: Reader, services: ServicesOf) -> dict[str, Any]:
    """All adapters."""
    return {"object": "list", "data": [_adapter(services, name) for name in services.models.adapters()]}


@router.get("/{adapter}")
def adapter(adapter: str, caller: Reader, services: ServicesOf) -> dict[str, Any]:
    """One adapter."""
    _existing(services, adapter)
    return _adapter(services, adapter)


@router.get("/{adapter}/versions")
def versions(adapter: str, caller: Reader, services: ServicesOf) -> dict[str, Any]:
    """The versions of an adapter, oldest first."""
    registry = _existing(services, adapter)
    return {"object": "list", "data": [_version(services, adapter, version) for version in registry.list()]}


@router.post("/{adapter}/versions")
async def add_version(adapter: str, body: AddVersion, caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Make a job's model a version of an adapter, which is created with its first version."""
    path = await run_in_threadpool(_path_to_add, services, adapter, body, caller)
    registry = services.models.registry(adapter)
    dataset = evaluation = None
    if body.evaluation is not None:
        dataset = await run_in_threadpool(body.evaluation.dataset, services.settings)
        model = await run_in_threadpool(services.models.find, body.model, caller.owner)
        evaluation = await evaluate_served(services.batcher, model, dataset)

    def add() -> dict[str, Any]:
        added = registry.add(path, name=body.version, dataset=dataset, evaluation=evaluation)
        return _version(services, adapter, added)

    return await run_in_threadpool(add)


@router.get("/{adapter}/versions/{version}")
def version(adapter: str, version: str, caller: Reader, services: ServicesOf) -> dict[str, Any]:
    """A version of an adapter."""
    return _version(services, adapter, _found(_existing(services, adapter), version))


@router.get("/{adapter}/versions/{version}/metrics")
def metrics(adapter: str, version: str, caller: Reader, services: ServicesOf) -> dict[str, Any]:
    """The metrics of a version, and how they differ from those of the version in use on the same queries."""
    registry = _existing(services, adapter)
    found, promoted = _found(registry, version), registry.promoted()
    differences: dict[str, Any] | None = None
    if promoted is not None and promoted.name != found.name:
        compared = registry.compare(promoted.name, found.name).metrics
        if compared is not None:
            differences = {
                name: {"difference": change.difference, "interval": list(change.interval)}
                for name, change in compared.items()
            }
    return {
        "object": "adapter.metrics",
        "version": found.name,
        "metrics": found.metrics,
        "evaluated_on": found.evaluated_on,
        "in_use": promoted and promoted.name,
        "differences": differences,
    }


@router.post("/{adapter}/promote")
def promote(adapter: str, body: Promote, caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Use a version: the adapter's name stands for it from now on."""
    registry = own_registry(services, adapter, caller)
    found = _found(registry, body.version)
    if body.gate and not (gate := registry.gate(found.name)):
        raise ServiceError(
            f"a version that does not pass the gate ({gate.reason})",
            "a version that is no worse than the one in use",
            'Evaluate it on more queries, or promote it with "gate": false.',
            code="gate_not_passed",
            param="version",
        )
    registry.promote(found.name)
    return _adapter(services, adapter)


@router.post("/{adapter}/rollback")
def rollback(adapter: str, caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Use the version again that was in use before the current one."""
    own_registry(services, adapter, caller).roll_back()
    return _adapter(services, adapter)


def _path_to_add(services: Services, adapter: str, body: AddVersion, caller: Caller) -> str:
    """The adapter directory of a job's model, after the checks of a new version."""
    job = services.models.job(body.model, caller.owner)
    if job is None:
        raise unknown_model(body.model)
    folder = services.models.registry(adapter).path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / _OWNER, "x", encoding="utf-8") as file:
            file.write(caller.id)
    except FileExistsError:
        _check_owner(folder, caller)
    return str(services.settings.models_dir / job.id)


def _existing(services: Services, adapter: str) -> RunRegistry:
    if adapter not in services.models.adapters():
        raise not_found("adapter", adapter, "GET /v1/adapters lists them.")
    return services.models.registry(adapter)


def own_registry(services: Services, adapter: str, caller: Caller) -> RunRegistry:
    """The versions of an adapter that the caller may change."""
    registry = _existing(services, adapter)
    _check_owner(registry.path, caller)
    return registry


def _check_owner(folder: Path, caller: Caller) -> None:
    if caller.owner not in (None, (folder / _OWNER).read_text(encoding="utf-8")):
        raise ServiceError(
            f"adapter {folder.name!r}, which belongs to another token",
            "an adapter whose first version this token added",
            "Choose another name, or use a token with the scope admin.",
            status=403,
            code="not_owner",
        )


def _found(registry: RunRegistry, version: str) -> Version:
    for found in registry.list():
        if found.name == version:
            return found
    raise not_found("version", version, "GET /v1/adapters/{adapter}/versions lists them.")


def _adapter(services: Services, name: str) -> dict[str, Any]:
    registry = services.models.registry(name)
    promoted = registry.promoted()
    return {
        "id": name,
        "object": "adapter",
        "in_use": promoted and promoted.name,
        "versions": [version.name for version in registry.list()],
    }


def _version(services: Services, adapter: str, version: Version) -> dict[str, Any]:
    """A version without its path, which is nobody's business."""
    return {
        "id": f"{adapter}@{version.name}",
        "object": "adapter.version",
        "version": version.name,
        "base_model": services.models.parent(version),
        "fingerprint": version.fingerprint,
        "trained": version.created,
        "added": version.added,
        "verdict": version.verdict,
        "metrics": version.metrics,
        "status": version.status,
    }
