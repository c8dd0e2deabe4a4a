"""`create_app`: the service as an ASGI application."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI

import llama_index_lora_embed
from llama_index_lora_embed.service.api import (
    adapters,
    evaluate,
    finetune,
    health,
    openai_embeddings,
    openai_files,
    openai_jobs,
    openai_models,
)
from llama_index_lora_embed.service.errors import install_error_handlers
from llama_index_lora_embed.service.jobs.sweep import SweepThread
from llama_index_lora_embed.service.limits import BodyLimit
from llama_index_lora_embed.service.metrics import Metrics, MetricsMiddleware
from llama_index_lora_embed.service.security import LoopbackOnly
from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.settings import ServiceSettings
from llama_index_lora_embed.service.web import routers as web
from llama_index_lora_embed.service.web.passages import PassageVectors

ROUTERS: tuple[APIRouter, ...] = (
    finetune.router,
    evaluate.router,
    adapters.router,
    openai_files.router,
    openai_jobs.router,
    openai_embeddings.router,
    openai_models.router,
    health.router,
    *web.ROUTERS,
)
"""The routers of all faces; each module of `service.api` has one named `router`."""


def create_app(settings: ServiceSettings | None = None) -> FastAPI:
    """The application.

    `app.state.services` is its `Services`, `app.state.metrics` its `Metrics`, and `app.state.stopping` an event that is
    set when the server is told to stop, at which streams end.

    Args:
        settings: None reads them from the environment.

    Raises:
        LoraEmbedError: As `Services`.
    """
    settings = settings or ServiceSettings()
    services = Services(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services.jobs.rebuild()
        sweep = SweepThread(services)
        sweep.start()
        yield
        app.state.stopping.set()
        sweep.stop()
        services.close()

    app = FastAPI(
        title="llama-index-lora-embed",
        version=llama_index_lora_embed.__version__,
        description="LoRA fine-tuning of embedding models as a service",
        lifespan=lifespan,
    )
    app.state.services = services
    app.state.stopping = threading.Event()
    app.state.page_vectors = PassageVectors()
    app.state.metrics = Metrics(services)
    larger = {"/v1/files": settings.max_upload_bytes, "/jobs": 2 * settings.max_upload_bytes}
    app.add_middleware(
        BodyLimit, max_bytes=settings.max_body_bytes, patience_s=settings.client_timeout_s, larger=larger
    )
    if settings.auth == "off":
        app.add_middleware(LoopbackOnly)
    app.add_middleware(MetricsMiddleware, metrics=app.state.metrics)
    install_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
