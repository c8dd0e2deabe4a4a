"""Whether the service is alive and ready."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import text

from llama_index_lora_embed.service.api.dependencies import ServicesOf
from llama_index_lora_embed.service.errors import ServiceError

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
