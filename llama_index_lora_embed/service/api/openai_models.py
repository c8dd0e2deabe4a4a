"""OpenAI's models: /v1/models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from llama_index_lora_embed.service.api.adapters import own_registry
from llama_index_lora_embed.service.api.dependencies import ServicesOf, Trainer
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.limits import StrictRoute
from llama_index_lora_embed.service.models import ModelCard, unknown_model
from llama_index_lora_embed.service.security import Caller, require

router = APIRouter(prefix="/v1/models", tags=["OpenAI: models"], route_class=StrictRoute)

User = Annotated[Caller, Depends(require("embed", "read"))]
"""A caller who may know names of models."""


@router.get("")
def models(caller: User, services: ServicesOf) -> dict[str, Any]:
    """The models that the caller can name."""
    return {"object": "list", "data": [_model(card) for card in services.models.cards(caller.owner)]}


@router.get("/{model:path}")
def model(model: str, caller: User, services: ServicesOf) -> dict[str, Any]:
    """One of the models."""
    for card in services.models.cards(caller.owner):
        if card.name == model:
            return _model(card)
    raise unknown_model(model)


@router.delete("/{model:path}")
def delete(model: str, caller: Trainer, services: ServicesOf) -> dict[str, Any]:
    """Delete the model of a job, or an adapter with its versions."""
    if model in services.settings.allowed_models or (model not in services.models.adapters() and "@" in model):
        raise ServiceError(
            f"model {model!r:.120}, which cannot be deleted",
            "the model of one of your jobs, or the name of an adapter",
            "Base models belong to the service, and versions stay as long as their adapter.",
            code="model_not_deletable",
            param="model",
        )
    if (job := services.models.job(model, caller.owner)) is not None:
        services.models.delete_job_model(job)
    elif model in services.models.adapters():
        own_registry(services, model, caller)
        services.models.delete_adapter(model)
    else:
        raise unknown_model(model)
    return {"id": model, "object": "model", "deleted": True}


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "llama-index-lora-embed",
        "parent": card.parent,
    }
