"""/v1/evaluate: retrieval metrics of a model on the caller's own queries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
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


class EvaluationData(BaseModel):
    """Queries, corpus and relevance, by ids; the ids of a list are its places, from 0."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    queries: dict[str, str] | list[str]
    """Query id to text."""
    corpus: dict[str, str] | list[str]
    """Passage id to text."""
    relevance: dict[str, Any] | list[Any]
    """Query id to the id of its relevant passage, a list of ids, or a mapping of ids to grades from 0 to 1; 0 is a
    passage that was judged irrelevant."""

    def dataset(self, settings: ServiceSettings) -> EmbeddingQAFinetuneDataset:
        """The package's dataset.

        Raises:
            DatasetError: It is empty, or ids are wrong; all of them are named.
            ServiceError: It is too large, or a value of `relevance` is none of the three.
        """
        from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset

        queries, corpus, relevance = map(_by_id, (self.queries, self.corpus, self.relevance))
        if (count := len(queries) + len(corpus)) > settings.max_evaluation_texts:
            raise ServiceError(
                f"{count} queries and passages",
                f"at most {settings.max_evaluation_texts}",
                "Evaluate on fewer, or with the Python package: evaluate_retrieval(LoraEmbedding(path), dataset).",
                param="corpus",
            )
        grades = {query_id: _grades(query_id, value) for query_id, value in relevance.items()}
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


def _by_id(values: dict[str, Any] | list[Any]) -> dict[str, Any]:
    return values if isinstance(values, dict) else {str(place): value for place, value in enumerate(values)}


def _grades(query_id: str, value: Any) -> dict[str, float]:
    """Passage id to grade."""
    if isinstance(value, (str, int)):
        value = [value]
    if isinstance(value, list) and all(isinstance(i, (str, int)) for i in value):
        return {str(i): 1.0 for i in value}
    if isinstance(value, dict) and all(
        isinstance(g, (int, float)) and not isinstance(g, bool) and 0 <= g <= 1 for g in value.values()
    ):
        return {str(i): float(g) for i, g in value.items()}
    raise ServiceError(
        f"relevance of query {query_id!r:.80}",
        "an id, a list of ids, or a mapping of ids to grades from 0 to 1",
        'For example {"q1": ["p1", "p2"]} or {"q1": {"p1": 1, "p2": 0.5}}.',
        param="relevance",
    )
