"""OpenAI's files: /v1/files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, UploadFile
from starlette.responses import FileResponse

from llama_index_lora_embed.service.api.dependencies import Reader, ServicesOf, Trainer
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.files import FileRow
from llama_index_lora_embed.service.limits import StrictRoute
from llama_index_lora_embed.service.settings import ServiceSettings

router = APIRouter(prefix="/v1/files", tags=["OpenAI: files"], route_class=StrictRoute)

_CHUNK = 2**20
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@router.post("")
def upload(file: UploadFile, purpose: Annotated[str, Form()], caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Upload JSON lines for training or validation; they are checked when a job names the file."""
    if purpose != "fine-tune":
        raise ServiceError(
            f"purpose {purpose!r:.80}", "'fine-tune'", "This service reads files for fine-tuning only.", param="purpose"
        )
    name = _CONTROL.sub("", file.filename or "") or "file"
    chunks: Iterator[bytes] = iter(partial(file.file.read, _CHUNK), b"")
    return _file(services.files.add(chunks, name, owner=caller.id, purpose=purpose), services.settings)


@router.get("")
def files(
    caller: Reader,
    services: ServicesOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """The caller's files, newest first ("desc") or oldest first ("asc")."""
    rows, more = services.files.list(
        caller.owner, after=after, limit=limit, purpose=purpose, oldest_first=order == "asc"
    )
    return page([_file(row, services.settings) for row in rows], more)


@router.get("/{file_id}")
def file(file_id: str, caller: Reader, services: ServicesOf) -> dict[str, Any]:
    """A file, without its content."""
    return _file(services.files.get(file_id, caller.owner), services.settings)


@router.get("/{file_id}/content")
def content(file_id: str, caller: Reader, services: ServicesOf) -> FileResponse:
    """The content of a file, byte for byte."""
    row = services.files.get(file_id, caller.owner)
    return FileResponse(
        services.files.path(row),
        media_type="application/octet-stream",
        headers={"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"},  # never shown as a page
    )


@router.delete("/{file_id}")
def delete(file_id: str, caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Delete a file; jobs that were created with it go on."""
    services.files.delete(file_id, caller.owner)
    return {"id": file_id, "object": "file", "deleted": True}


def page(data: Sequence[dict[str, Any]], more: bool) -> dict[str, Any]:
    """A page of a list, as OpenAI's clients follow it with `after=<last_id>`."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": list(data), "first_id": first, "last_id": last, "has_more": more}


def _file(row: FileRow, settings: ServiceSettings) -> dict[str, Any]:
    kept = settings.keep_files_s
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": int(row.created),
        "expires_at": None if kept is None else int(row.created + kept),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
    }
