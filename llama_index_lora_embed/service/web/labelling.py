"""Pages on which a person grades passages for queries of users: one query and one passage at a time."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response

from llama_index_lora_embed.core.errors import LoraEmbedError
from llama_index_lora_embed.service.api.dependencies import ServicesOf
from llama_index_lora_embed.service.errors import ServiceError, not_found
from llama_index_lora_embed.service.files import disk_error
from llama_index_lora_embed.service.security import Caller
from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.web.label_store import LabelStore, ServedEmbedding
from llama_index_lora_embed.service.web.pages import (
    FORM,
    PageEmbedder,
    PageRoute,
    problems_of,
    redirect,
    render,
    status_of,
)
from llama_index_lora_embed.service.web.passages import pasted_lines
from llama_index_lora_embed.service.web.search import Choices, PassageFields, PassageForm

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_QUERIES = 100


def _store(services: Services) -> LabelStore:
    return LabelStore(services.settings.labelling_dir)


@router.get("/label", name="labellings_page")
def labellings(request: Request, services: ServicesOf, caller: PageEmbedder) -> Response:
    """The visitor's labellings, and the form that begins one."""
    return _page(request, services, caller, Choices.of(services, caller), {**asdict(PassageForm()), "queries": ""}, [])


@router.post("/label", dependencies=FORM)
def begin(
    request: Request,
    services: ServicesOf,
    caller: PageEmbedder,
    fields: PassageFields,
    queries: Annotated[str, Form()] = "",
) -> Response:
    """Pool what base and tuned model and BM25 find for each query."""
    given = {**asdict(fields), "queries": queries}
    choices = Choices.of(services, caller)
    try:
        asked = pasted_lines(queries, "queries", services, _QUERIES)
        card = choices.card(fields)
        nodes = choices.passages(services, caller, fields)
        models = {
            name: ServedEmbedding(batcher=services.batcher, served=services.models.find(name, caller.owner))
            for name in (str(card.parent), card.name)
        }
        info = _store(services).begin(caller.id, card.name, asked, nodes, models)
    except LoraEmbedError as error:
        return _page(request, services, caller, choices, given, problems_of(request, error), status_of(error))
    return redirect(request, "labelling_page", labelling_id=info.id)


@router.get("/label/{labelling_id}", name="labelling_page")
def labelling(request: Request, labelling_id: str, services: ServicesOf, caller: PageEmbedder) -> Response:
    """The next passage without a grade."""
    from llama_index_lora_embed.evaluation.judging.grades import RUBRIC

    info, found = _store(services).open(labelling_id, caller.owner)
    pair = found.next()
    return render(
        request,
        "labelling.html.j2",
        info=info,
        pair=pair,
        query="" if pair is None else found.pool.queries[pair[0]],
        passage="" if pair is None else found.pool.corpus[pair[1]],
        place=(0, 0, 0) if pair is None else found.place(pair),
        queries=len(found.pool.queries),
        answered=found.answered(),
        report=str(found.result().report),
        rubric=[(line[0], line[3:]) for line in reversed(RUBRIC.splitlines())],
    )


@router.post("/label/{labelling_id}/answer", dependencies=FORM)
def answer(
    request: Request,
    labelling_id: str,
    services: ServicesOf,
    caller: PageEmbedder,
    typed: Annotated[str, Form()] = "",
    query_id: Annotated[str, Form()] = "",
    passage_id: Annotated[str, Form()] = "",
) -> Response:
    """Store a grade, skip a passage, or take the last answer back."""
    from llama_index_lora_embed.evaluation.judging.label import UNDO

    _, found = _store(services).open(labelling_id, caller.owner)
    try:
        if typed == UNDO:
            found.undo()
        elif (query_id, passage_id) not in found.pairs:
            raise not_found("passage", passage_id, "Open the page again.")
        elif not found.answer((query_id, passage_id), typed):
            raise ServiceError(f"the grade {typed!r:.40}", "0 to 3, or s to skip", "Press one of the buttons.")
    except OSError as error:
        raise disk_error(error) from error
    return redirect(request, "labelling_page", labelling_id=labelling_id)


@router.post("/label/{labelling_id}/delete", dependencies=FORM)
def delete(request: Request, labelling_id: str, services: ServicesOf, caller: PageEmbedder) -> Response:
    """Delete a labelling with its answers."""
    _store(services).delete(labelling_id, caller.owner)
    return redirect(request, "labellings_page")


@router.get("/label/{labelling_id}/dataset.json")
def dataset(labelling_id: str, services: ServicesOf, caller: PageEmbedder) -> Response:
    """The finished queries as the JSON of a graded `EmbeddingQAFinetuneDataset`."""
    info, found = _store(services).open(labelling_id, caller.owner)
    made = found.result().dataset
    if not made.queries:
        raise ServiceError(
            "a labelling without a finished query that has a relevant passage",
            "at least one query whose passages are all graded, one of them 2 or 3",
            "Grade more passages.",
        )
    return Response(
        json.dumps(made.model_dump(mode="json", exclude_none=True)),
        media_type="application/json",
        headers={"Content-Disposition": f'attachment; filename="{info.id}.json"'},
    )


def _page(
    request: Request,
    services: Services,
    caller: Caller,
    choices: Choices,
    given: dict[str, str],
    problems: list[str],
    status: int = 200,
) -> Response:
    return render(
        request,
        "label.html.j2",
        status,
        given=given,
        problems=problems,
        models=choices.models,
        sources=choices.sources,
        labellings=_store(services).list(caller.owner),
    )
