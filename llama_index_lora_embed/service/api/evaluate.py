"""/v1/evaluate: retrieval metrics of a model on the caller's own queries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from llama_index_lora_embed.service.api.dependencies import ServicesOf
from llama_index_lora_embed.service.api.openai_embeddings import Embedder, find_model
from llama_index_lora_embed.service.embedding import Batcher, ServedModel
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.limits import StrictRoute
from llama_index_lora_embed.service.settings import ServiceSettings

if TYPE_CHECKING:
    from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
    from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation

router = APIRouter(prefix="/v1", tags=["evaluation"], route_class=StrictRoute)

_METRICS = {
    "mrr": "mrr@10",
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "ndcg_at_10": "ndcg@10",
    "map": "map@100",
}
"""Names of the answer to those of `evaluation.metrics`."""
_ID = ("_id", "id", "query_id", "passage_id", "doc_id")
_TEXT = ("text", "query", "passage", "content")
_QUERY_ID = ("query_id", "query-id", "qid")
_PASSAGE_ID = ("corpus_id", "corpus-id", "passage_id", "doc_id", "pid")
_GRADE = ("score", "grade", "relevance", "label")


class EvaluationData(BaseModel):
    """Queries, corpus and relevance, by ids, in the forms that are usual; the ids of a list are its places, from 0."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    queries: dict[str, Any] | list[Any]
    """Query id to text; a list of texts; or a list of rows with an id and a text (`{"_id", "text"}`, as in BEIR)."""
    corpus: dict[str, Any] | list[Any]
    """The same for passages, where a text may be `{"title", "text"}`, which are read as one."""
    relevance: dict[str, Any] | list[Any]
    """Query id to the id of its relevant passage, a list of ids, or a mapping of ids to grades; or rows
    `{"query_id", "corpus_id", "score"}`. A grade of 0 or less is of a passage that was judged irrelevant; where grades
    exceed 1, all are divided by the largest, which changes no metric."""

    def dataset(self, settings: ServiceSettings) -> EmbeddingQAFinetuneDataset:
        """The package's dataset.

        Raises:
            DatasetError: It is empty, or ids are wrong; all of them are named.
            ServiceError: It is too large, or something in it has none of the forms.
        """
        from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset

        queries, corpus = _texts(self.queries, "queries"), _texts(self.corpus, "corpus")
        if (count := len(queries) + len(corpus)) > settings.max_evaluation_texts:
            raise ServiceError(
                f"{count} queries and passages",
                f"at most {settings.max_evaluation_texts}",
                "Evaluate on fewer, or with the Python package: evaluate_retrieval(LoraEmbedding(path), dataset).",
                param="corpus",
            )
        grades = _all_grades(self.relevance)
        below_1 = {q: {i: g for i, g in found.items() if 0 < g < 1} for q, found in grades.items()}
        irrelevant = {q: [i for i, g in found.items() if g == 0] for q, found in grades.items()}
        return EmbeddingQAFinetuneDataset(
            queries=queries,
            corpus=corpus,
            relevant_docs={q: [i for i, g in found.items() if g > 0] for q, found in grades.items()},
            relevance_scores={q: found for q, found in below_1.items() if found} or None,
            judged_irrelevant={q: found for q, found in irrelevant.items() if found} or None,
        ).check("evaluation data")


class EvaluateRequest(EvaluationData):
    """The body of /v1/evaluate."""

    model: str
    """A name of /v1/models, or the id of a job that has succeeded."""


@router.post("/evaluate")
async def evaluate(body: EvaluateRequest, caller: Embedder, services: ServicesOf) -> dict[str, Any]:
    """Metrics by exact search with cosine similarity, from 0 to 1, as trec_eval defines them."""
    dataset = await run_in_threadpool(body.dataset, services.settings)
    model, _ = await run_in_threadpool(find_model, services, body.model, caller)
    evaluation = await evaluate_served(services.batcher, model, dataset)
    return {
        "object": "evaluation",
        "model": body.model,
        **{name: evaluation.metrics[metric] for name, metric in _METRICS.items()},
        "queries": len(dataset.queries),
        "passages": len(dataset.corpus),
        "notes": evaluation.notes,
    }


async def evaluate_served(
    batcher: Batcher, model: ServedModel, dataset: EmbeddingQAFinetuneDataset
) -> RetrievalEvaluation:
    """`evaluate_retrieval` of a served model; its texts take turns with other requests."""
    from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders

    queries, passages = ([*dict.fromkeys(texts.values())] for texts in (dataset.queries, dataset.corpus))
    both = await asyncio.gather(batcher.embed(model, queries, "query"), batcher.embed(model, passages, "passage"))
    row_of = ({text: row for row, text in enumerate(texts)} for texts in (queries, passages))

    def encoder(vectors: Any, rows: Mapping[str, int]) -> Any:
        return lambda texts: vectors[[rows[text] for text in texts]]

    of_queries, of_passages = (encoder(part.vectors, rows) for part, rows in zip(both, row_of, strict=True))
    return await run_in_threadpool(evaluate_encoders, of_queries, of_passages, dataset)


def _texts(values: dict[str, Any] | list[Any], param: str) -> dict[str, str]:
    """Id to text."""
    found: dict[str, str] = {}
    for place, value in values.items() if isinstance(values, dict) else enumerate(values):
        row = value if isinstance(value, dict) else {"text": value}
        row_id, text, title = _first(row, _ID), _first(row, _TEXT), row.get("title") or ""
        if not isinstance(text, str) or not isinstance(title, str) or not isinstance(row_id, (str, int, type(None))):
            raise ServiceError(
                f"{param}[{place!r:.80}]",
                "a text, or an object with a text",
                'For example {"p1": "a text"}, ["a text"] or [{"id": "p1", "text": "a text"}].',
                param=param,
            )
        key = str(place if row_id is None or isinstance(values, dict) else row_id)
        if key in found:
            raise ServiceError(f"the id {key!r:.80} twice in {param}", "each id once", "Correct it.", param=param)
        found[key] = f"{title} {text}" if title else text
    return found


def _all_grades(relevance: dict[str, Any] | list[Any]) -> dict[str, dict[str, float]]:
    """Query id to passage id to grade, from 0 to 1."""
    grades: dict[str, dict[str, float]] = {}
    if isinstance(relevance, list) and relevance and all(_is_judgement(row) for row in relevance):
        for row in relevance:
            query_id, passage_id, grade = (
                str(_first(row, _QUERY_ID)),
                str(_first(row, _PASSAGE_ID)),
                _first(row, _GRADE),
            )
            grades.setdefault(query_id, {}).update(_grades(query_id, {passage_id: 1 if grade is None else grade}))
    else:
        rows = relevance.items() if isinstance(relevance, dict) else enumerate(relevance)
        grades = {str(query_id): _grades(str(query_id), value) for query_id, value in rows}
    largest = max((grade for found in grades.values() for grade in found.values()), default=0.0)
    return {q: {i: grade / max(1.0, largest) for i, grade in found.items()} for q, found in grades.items()}


def _is_judgement(row: Any) -> bool:
    return isinstance(row, dict) and _first(row, _QUERY_ID) is not None and _first(row, _PASSAGE_ID) is not None


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _grades(query_id: str, value: Any) -> dict[str, float]:
    """Passage id to grade, 0 or more."""
    if isinstance(value, (str, int)):
        value = [value]
    if isinstance(value, list) and all(isinstance(i, (str, int)) for i in value):
        return {str(i): 1.0 for i in value}
    if isinstance(value, dict) and all(isinstance(g, (int, float)) and not isinstance(g, bool) for g in value.values()):
        return {str(i): max(0.0, float(g)) for i, g in value.items()}
    raise ServiceError(
        f"relevance of query {query_id!r:.80}",
        "an id, a list of ids, or a mapping of ids to grades",
        'For example {"q1": ["p1", "p2"]} or {"q1": {"p1": 1, "p2": 0.5}}.',
        param="relevance",
    )
