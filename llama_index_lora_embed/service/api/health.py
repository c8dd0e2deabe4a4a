"""Whether the service is alive and ready, and its metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text

from llama_index_lora_embed.service.api.dependencies import ServicesOf
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.security import Caller, require

router = APIRouter(tags=["health"])


@router.get("/health")
def health() -> dict[str, str]:
    """Whether the process answers; looks at nothing else."""
    return {"status": "ok"}


@router.get("/ready")
def ready(services: ServicesOf) -> dict[str, str]:
    """Whether database and queue can be used, so that jobs are accepted; 503 if not."""
    try:
        with services.database.read() as session:
            session.execute(text("SELECT 1"))
        len(services.queue)
    except Exception as error:
        raise ServiceError(
            f"a database or queue that cannot be used ({type(error).__name__})",
            "both",
            "The server's log says why.",
            status=503,
            code="not_ready",
        ) from error
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
def metrics(request: Request, caller: Annotated[Caller, Depends(require("admin"))]) -> Response:
    """Metrics for Prometheus, with the scope admin, because they count the jobs of all tokens."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
