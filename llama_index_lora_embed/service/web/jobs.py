"""Pages of jobs: the list, the form of a new one, and one job with its progress and loss curve."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Header, Request, Response, UploadFile
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import ValidationError
from starlette.responses import FileResponse, JSONResponse

from llama_index_lora_embed.core.errors import LoraEmbedError
from llama_index_lora_embed.service.api import finetune, openai_files
from llama_index_lora_embed.service.api.dependencies import ServicesOf
from llama_index_lora_embed.service.errors import ServiceError, not_found
from llama_index_lora_embed.service.jobs.state import LIVE, JobState
from llama_index_lora_embed.service.limits import strict_json
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

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_PAGE = 25
_TEXTS = ("model", "query_origin", "suffix", "more")
_FIELDS = ("epochs", "batch_size", "learning_rate")
_ACTIONS = {"cancel": finetune.cancel, "pause": finetune.pause, "resume": finetune.resume}
_REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
"""A report is made of the texts of a job; whatever is in them, it runs nothing, sends nothing and loads nothing."""


@router.get("/", name="jobs_page")
def jobs(request: Request, services: ServicesOf, caller: PageReader, after: str | None = None) -> Response:
    """The jobs of the visitor, newest first."""
    found, more = services.jobs.list(caller.owner, after=after, limit=_PAGE)
    return render(
        request,
        "jobs.html.j2",
        jobs=[finetune.shown(job) for job in found],
        live=[job.id for job in found if job.status in LIVE],
        after=found[-1].id if more else None,
    )


@router.get("/jobs/progress")
def progress(services: ServicesOf, caller: PageReader, ids: str) -> Response:
    """How far jobs of the list are, by id."""
    found: dict[str, Any] = {}
    for job_id in ids.split(",")[:_PAGE]:
        with suppress(ServiceError):
            job = finetune.shown(services.jobs.get(job_id, caller.owner))
            found[job_id] = {"status": job.status, "fraction": job.progress["fraction"], "verdict": job.verdict}
    return JSONResponse(found)


@router.get("/jobs/new")
def new(request: Request, services: ServicesOf, caller: PageTrainer) -> Response:
    """The form of a new job."""
    return _form(request, services, dict.fromkeys((*_TEXTS, *_FIELDS), ""), [])


@router.post("/jobs", dependencies=FORM)
def create(
    request: Request,
    services: ServicesOf,
    caller: PageTrainer,
    training: Annotated[UploadFile, File()],
    validation: Annotated[UploadFile | None, File()] = None,
    model: Annotated[str, Form()] = "",
    query_origin: Annotated[str, Form()] = "",
    suffix: Annotated[str, Form()] = "",
    epochs: Annotated[str, Form()] = "",
    batch_size: Annotated[str, Form()] = "",
    learning_rate: Annotated[str, Form()] = "",
    more: Annotated[str, Form()] = "",
) -> Response:
    """Create a job as the API does; what is wrong is shown with the form."""
    given = {
        "model": model, "query_origin": query_origin, "suffix": suffix, "epochs": epochs, "batch_size": batch_size,
        "learning_rate": learning_rate, "more": more,
    }  # fmt: skip
    uploaded: list[str] = []
    try:
        arguments = {name: _value(given[name]) for name in _FIELDS if given[name].strip()} | _object(more)
        for file in (training, validation):
            if file is not None and file.filename:
                uploaded.append(openai_files.upload(file, "fine-tune", caller, services)["id"])
            elif file is training:
                raise ServiceError("no file", "a file with training data", "Choose one.", param="training")
        named = dict(zip(("training_file", "validation_file"), uploaded, strict=False))
        body = finetune.FinetuneRequest.model_validate(
            {**arguments, **named, "model": model, "query_origin": query_origin or None, "suffix": suffix or None}
        )
        job = finetune.create(body, services, caller)
    except (LoraEmbedError, ValidationError) as error:
        for file_id in uploaded:
            services.files.delete(file_id, caller.owner)
        problems = problems_of(request, error)
        status = status_of(error)
        return _form(request, services, given, problems, status)
    return redirect(request, "job_page", job_id=job.job_id)


@router.get("/jobs/{job_id}", name="job_page")
def job(request: Request, job_id: str, services: ServicesOf, caller: PageReader) -> Response:
    """A job; its script draws the loss curve from the events."""
    state = services.jobs.get(job_id, caller.owner)
    shown = finetune.shown(state)
    return render(
        request,
        "job.html.j2",
        job=shown,
        live=state.status in LIVE,
        actions=_actions(state),
        report=services.settings.report(job_id).is_file(),
        metrics={name: values for name, values in shown.metrics.items() if isinstance(values, dict)},
    )


@router.post("/jobs/{job_id}/{action}", dependencies=FORM)
def change(request: Request, job_id: str, action: str, services: ServicesOf, caller: PageTrainer) -> Response:
    """Cancel, pause or resume a job."""
    if action not in _ACTIONS:
        raise not_found("action", action, "cancel, pause or resume.")
    _ACTIONS[action](job_id, services, caller)
    return redirect(request, "job_page", job_id=job_id)


def _stream_start(
    job_id: str, services: ServicesOf, caller: PageReader, last_event_id: Annotated[str | None, Header()] = None
) -> int:
    return finetune.stream_start(job_id, services, caller, last_event_id)


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
async def events(
    job_id: str, request: Request, services: ServicesOf, start: Annotated[int, Depends(_stream_start)]
) -> AsyncIterator[ServerSentEvent]:
    """The stream of GET /v1/finetune/{job_id}/events, for which a browser cannot send a token in a header."""
    async for event in finetune.events(job_id, request, services, start):
        yield event


@router.get("/reports/{job_id}")
def report(job_id: str, services: ServicesOf, caller: PageReader) -> Response:
    """The report of a job, in a sandbox."""
    path = services.settings.report(services.jobs.get(job_id, caller.owner).id)
    if not path.is_file():
        raise not_found("report", job_id, "It is written when a job succeeds that was evaluated.")
    return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": _REPORT_POLICY})


def _form(
    request: Request, services: Services, given: dict[str, str], problems: list[str], status: int = 200
) -> Response:
    models = list(services.settings.allowed_models)
    return render(request, "new_job.html.j2", status, models=models, given=given, problems=problems)


def _actions(state: JobState) -> list[str]:
    """What can be done with a job now."""
    if state.status in ("queued", "running"):
        return ["pause", "cancel"]
    if state.status == "paused":
        return ["resume", "cancel"]
    return ["resume"] if state.status in ("cancelled", "failed") and not state.run_deleted else []


def _value(text: str) -> Any:
    """A number, or the text as it is: "auto", or what the check of the field then names."""
    with suppress(ValueError):
        return json.loads(text, parse_constant=str)
    return text.strip()


def _object(text: str) -> dict[str, Any]:
    """The further settings."""
    if not text.strip():
        return {}
    try:
        value = strict_json(text.encode("utf-8", "surrogatepass"))
    except ServiceError:
        value = None
    if not isinstance(value, dict):
        raise ServiceError("further settings that are no JSON object", '{"lora_r": 16}', "Correct them.", param="more")
    return value
