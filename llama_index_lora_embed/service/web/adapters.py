"""Pages of adapters: their versions with verdicts, metrics and reports, and which one is in use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Form, Request, Response
from pydantic import ValidationError

from llama_index_lora_embed.core.errors import LoraEmbedError
from llama_index_lora_embed.service.api import adapters as api
from llama_index_lora_embed.service.api import finetune
from llama_index_lora_embed.service.api.dependencies import ServicesOf
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.jobs.state import JobState
from llama_index_lora_embed.service.security import Caller
from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.web.pages import (
    FORM,
    PageReader,
    PageRoute,
    PageTrainer,
    problems_of,
    redirect,
    render,
    status_of,
)

if TYPE_CHECKING:
    from llama_index_lora_embed.deployment.versions import Version

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_JOBS = 100  # newest jobs that can become a version


@router.get("/adapters", name="adapters_page")
def adapters(request: Request, services: ServicesOf, caller: PageReader) -> Response:
    """All adapters, and the form that makes a job's model a version of one."""
    return _page(request, services, caller)


@router.post("/adapters", dependencies=FORM)
async def add(
    request: Request,
    services: ServicesOf,
    caller: PageTrainer,
    adapter: Annotated[str, Form()] = "",
    model: Annotated[str, Form()] = "",
) -> Response:
    """Make a job's model a version of an adapter."""
    try:
        await api.add_version(adapter.strip(), api.AddVersion(model=model), caller, services)
    except (LoraEmbedError, ValidationError) as error:
        status = status_of(error)
        return _page(request, services, caller, problems_of(request, error), status, adapter)
    return redirect(request, "adapters_page")


@router.post("/adapters/{adapter}/promote", dependencies=FORM)
def promote(
    request: Request, adapter: str, services: ServicesOf, caller: PageTrainer, version: Annotated[str, Form()] = ""
) -> Response:
    """Use a version."""
    api.promote(adapter, api.Promote(version=version), caller, services)
    return redirect(request, "adapters_page")


@router.post("/adapters/{adapter}/rollback", dependencies=FORM)
def rollback(request: Request, adapter: str, services: ServicesOf, caller: PageTrainer) -> Response:
    """Use the version again that was in use before."""
    api.rollback(adapter, caller, services)
    return redirect(request, "adapters_page")


def succeeded_jobs(services: Services, owner: str | None) -> list[JobState]:
    """The newest jobs of an owner that have a model."""
    return [job for job in services.jobs.list(owner, limit=_JOBS, statuses=["succeeded"])[0] if job.has_model]


def _page(
    request: Request, services: Services, caller: Caller, problems: list[str] | None = None, status: int = 200,
    adapter: str = "",
) -> Response:  # fmt: skip
    shown = []
    for name in services.models.adapters():
        registry = services.models.registry(name)
        used = registry.promoted()
        versions = [_version(services, caller, version) for version in registry.list()]
        shown.append({"name": name, "in_use": used and used.name, "versions": versions})
    jobs = [finetune.shown(job) for job in succeeded_jobs(services, caller.owner)]
    return render(
        request, "adapters.html.j2", status, adapters=shown, jobs=jobs, problems=problems or [], adapter=adapter
    )


def _version(services: Services, caller: Caller, version: Version) -> dict[str, Any]:
    """What the page shows of a version; its job and report only if the visitor may see them."""
    job_id: str | None = Path(version.path).name
    try:
        services.jobs.get(str(job_id), caller.owner)
    except ServiceError:
        job_id = None
    return {
        "name": version.name,
        "base": services.models.parent(version),
        "verdict": version.verdict,
        "added": version.added[:10],
        "status": version.status,
        "metrics": version.metrics,
        "job": job_id,
        "report": job_id is not None and services.settings.report(job_id).is_file(),
    }
