"""OpenAI's embeddings: /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from llama_index_lora_embed.service.api.dependencies import ServicesOf
from llama_index_lora_embed.service.embedding import Embedded, ServedModel, Side
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.limits import StrictRoute
from llama_index_lora_embed.service.models import side_of
from llama_index_lora_embed.service.security import Caller, require
from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.settings import ServiceSettings

router = APIRouter(prefix="/v1", tags=["OpenAI: embeddings"], route_class=StrictRoute)

Embedder = Annotated[Caller, Depends(require("embed"))]
"""A caller who may embed and evaluate."""


class EmbeddingsRequest(BaseModel):
    """The body of /v1/embeddings; fields of other services are ignored."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str
    """A name of /v1/models; "-query" or "-passage" at its end is an `input_type`."""
    input: Any
    """A text, or a list of texts."""
    encoding_format: Literal["float", "base64"] = "float"
    """"base64" is of little-endian float32."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Number of leading dimensions to keep; for models that were trained for it (Matryoshka)."""
    input_type: Side | None = None
    """Whether the texts are queries or passages; passages where nothing says it."""


@router.post("/embeddings")
async def embeddings(body: EmbeddingsRequest, caller: Embedder, services: ServicesOf) -> Response:
    """Vectors of texts, in their order."""
    texts = _texts(body.input, services.settings)
    model, side = await run_in_threadpool(find_model, services, body.model, caller, body.input_type)
    embedded = await services.batcher.embed(model, texts, side, dimensions=body.dimensions)
    return await run_in_threadpool(_answer, body, embedded)


def find_model(services: Services, name: str, caller: Caller, side: Side | None = None) -> tuple[ServedModel, Side]:
    """What the name of a request stands for, and the side: the one that is given, that of the name, or "passage".

    Raises:
        ServiceError: 404, there is no such model; 400, the name's side is not the one that is given.
    """
    try:
        return services.models.find(name, caller.owner), side or "passage"
    except ServiceError:
        plain, named = side_of(name)
        if named is None:
            raise
    found = services.models.find(plain, caller.owner)
    if side not in (None, named):
        raise ServiceError(
            f"model {name!r:.120} with input_type {side!r}",
            f"{named!r}",
            "Leave one of the two out.",
            param="input_type",
        )
    return found, named


def _texts(given: Any, settings: ServiceSettings) -> list[str]:
    """The texts of a request, within the limits."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        got = "an empty list" if texts == [] else f"a value of type {type(given).__name__}"
        raise _wrong_input(got, "Put one text or more into input.")
    if all(isinstance(item, int) or (isinstance(item, list) and item) for item in texts):
        raise _wrong_input(
            "lists of tokens, which are numbers of OpenAI's tokenizer and mean other words to this model",
            "Send the texts; LangChain does with OpenAIEmbeddings(check_embedding_ctx_length=False).",
        )
    others = [(i, type(text).__name__) for i, text in enumerate(texts) if not isinstance(text, str)]
    if others:
        problems = [f"input[{i}] is of type {name}" for i, name in others[:10]]
        raise _wrong_input(f"{len(others)} of {len(texts)} inputs that are not texts", "Correct these:", problems)
    characters = sum(map(len, texts))
    for count, limit, what in (
        (len(texts), settings.max_texts, "texts"),
        (characters, settings.max_characters, "characters"),
    ):
        if count > limit:
            raise ServiceError(
                f"{count} {what}", f"at most {limit} in a request", "Send several requests.", param="input"
            )
    return texts


def _wrong_input(got: str, hint: str, problems: list[str] | None = None) -> ServiceError:
    return ServiceError(got, "a text or a list of texts", hint, problems or (), param="input")


def _answer(body: EmbeddingsRequest, embedded: Embedded) -> Response:
    if body.encoding_format == "base64":
        rows = embedded.vectors.astype(np.dtype("<f4"), copy=False)
        encoded: list[Any] = [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]
    else:
        encoded = embedded.vectors.tolist()
    return JSONResponse(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(encoded)],
            "model": body.model,
            "usage": {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens},
            "truncated_texts": embedded.truncated,
        }
    )
