"""The page on which a query is tried: what base and tuned model find for it, side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, Response
from llama_index.core.schema import MetadataMode

from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.core.errors import LoraEmbedError
from llama_index_lora_embed.service.api.dependencies import ServicesOf
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.models import ModelCard, fine_tuned_model, unknown_model
from llama_index_lora_embed.service.security import Caller
from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.web.adapters import succeeded_jobs
from llama_index_lora_embed.service.web.pages import FORM, PageEmbedder, PageRoute, problems_of, render, status_of
from llama_index_lora_embed.service.web.passages import PassageVectors, nodes_of, passages_of_job, pasted_lines

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_SHOWN = 5  # passages of each model


@dataclass(frozen=True)
class Found:
    """A passage of a result.

    Attributes:
        text: Of the passage.
        score: Cosine similarity to the query.
        other: Its rank, from 1, with the other model.
    """

    text: str
    score: float
    other: int


@dataclass(frozen=True)
class PassageForm:
    """The fields that the forms of `/try` and `/label` share.

    Attributes:
        model: Name of a tuned model.
        source: Id of the job whose passages are meant; "" for pasted ones.
        passages: Pasted, one on each line.
    """

    model: Annotated[str, Form()] = ""
    source: Annotated[str, Form()] = ""
    passages: Annotated[str, Form()] = ""


@dataclass(frozen=True)
class Choices:
    """What a visitor can choose in these forms, looked up once for a page.

    Attributes:
        models: The tuned models.
        sources: The jobs whose passages can be taken: id to the name of the model.
    """

    models: list[ModelCard]
    sources: dict[str, str]

    @classmethod
    def of(cls, services: Services, caller: Caller) -> Choices:
        """Those of a visitor."""
        models = [card for card in services.models.cards(caller.owner) if card.parent is not None]
        jobs = succeeded_jobs(services, caller.owner) if caller.may("read") else []
        return cls(models, {job.id: fine_tuned_model(job) for job in jobs if not job.run_deleted})

    def card(self, form: PassageForm) -> ModelCard:
        """The tuned model of a form.

        Raises:
            ServiceError: 404, there is no such model.
        """
        for card in self.models:
            if card.name == form.model:
                return card
        raise unknown_model(form.model)

    def passages(self, services: Services, caller: Caller, form: PassageForm) -> list[BaseNode]:
        """The passages of a form: pasted ones, or those of a job.

        Raises:
            ServiceError: There are none, too many, or the job is not the visitor's.
        """
        if not form.source:
            return nodes_of(pasted_lines(form.passages, "passages", services))
        if form.source not in self.sources:
            got = f"job {form.source!r:.80}"
            raise ServiceError(got, "a job of the list", "Choose one, or paste passages.", param="source")
        return passages_of_job(services, services.jobs.get(form.source, caller.owner))


PassageFields = Annotated[PassageForm, Depends()]
"""The fields of a form as a dependency of its route."""


@router.get("/try")
def form(request: Request, services: ServicesOf, caller: PageEmbedder, model: str = "") -> Response:
    """The form."""
    return _page(request, Choices.of(services, caller), {**asdict(PassageForm(model=model)), "query": ""})


@router.post("/try", dependencies=FORM)
def search(
    request: Request,
    services: ServicesOf,
    caller: PageEmbedder,
    fields: PassageFields,
    query: Annotated[str, Form()] = "",
) -> Response:
    """Rank the passages with the tuned model and with its base."""
    given = {**asdict(fields), "query": query}
    choices = Choices.of(services, caller)
    try:
        asked = pasted_lines(query, "queries", services, 1)
        chosen = choices.card(fields)
        nodes = choices.passages(services, caller, fields)
        texts = [node.get_content(MetadataMode.EMBED) for node in nodes]
        kept: PassageVectors = request.app.state.page_vectors
        ranked = [_ranked(services, kept, name, caller, asked[0], texts) for name in (str(chosen.parent), chosen.name)]
    except LoraEmbedError as error:
        return _page(request, choices, given, problems_of(request, error), status_of(error))
    (base, base_scores), (tuned, tuned_scores) = ranked
    return _page(
        request,
        choices,
        given,
        sides=[
            (str(chosen.parent), _found(base, base_scores, tuned, texts)),
            (chosen.name, _found(tuned, tuned_scores, base, texts)),
        ],
        count=len(texts),
    )


def _ranked(
    services: Services, kept: PassageVectors, name: str, caller: Caller, query: str, texts: list[str]
) -> tuple[list[int], list[float]]:
    """All passages by their numbers, best first, with their scores."""
    from llama_index_lora_embed.evaluation.search import nearest

    model = services.models.find(name, caller.owner)
    vector = unit_norm(services.batcher.submit(model, [query], "query").result().vectors)
    rows, scores = nearest(vector, kept.of(services, model, texts), len(texts))
    return rows[0].tolist(), scores[0].tolist()


def _found(ranks: list[int], scores: list[float], others: list[int], texts: list[str]) -> list[Found]:
    places = {number: place for place, number in enumerate(others, start=1)}
    return [Found(texts[n], score, places[n]) for n, score in zip(ranks[:_SHOWN], scores, strict=False)]


def _page(
    request: Request,
    choices: Choices,
    given: dict[str, str],
    problems: list[str] | None = None,
    status: int = 200,
    sides: list[tuple[str, list[Found]]] | None = None,
    count: int = 0,
) -> Response:
    values: dict[str, Any] = {"given": given, "problems": problems or [], "sides": sides or [], "count": count}
    return render(request, "try.html.j2", status, models=choices.models, sources=choices.sources, **values)
