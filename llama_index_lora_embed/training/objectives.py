"""What is trained: rows, collator and loss for the trainer, by objective."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.errors import ConfigError
from llama_index_lora_embed.training.batches import GroupCollator, TrainingGroup
from llama_index_lora_embed.training.loss import MaskedInfoNCELoss


def training_inputs(
    model: SentenceTransformer,
    dataset: EmbeddingQAFinetuneDataset,
    groups: list[TrainingGroup],
    loss: Any,
    settings: TrainingSettings,
) -> dict[str, Any]:
    """train_dataset, data_collator and loss for the trainer."""
    if loss is None:
        return {
            "train_dataset": Dataset.from_dict({"group": list(range(len(groups)))}),
            "data_collator": GroupCollator(model, dataset, groups),
            "loss": MaskedInfoNCELoss(model, settings.temperature),
        }
    if isinstance(loss, torch.nn.Module) and not hasattr(loss, "model"):
        raise ConfigError(
            f"loss of type {type(loss).__name__} without .model",
            "a sentence-transformers loss, or a callable that makes one from the model",
            "Pass the class: loss=losses.MultipleNegativesRankingLoss.",
        )
    rows = [{"anchor": dataset.queries[q], "positive": g.passage} for g in groups for q in g.query_ids]
    for column, texts in enumerate(_negative_columns(dataset, groups), 1):
        for row, text in zip(rows, texts, strict=True):
            row[f"negative_{column}"] = text
    return {"train_dataset": Dataset.from_list(rows), "loss": loss}


def _negative_columns(dataset: EmbeddingQAFinetuneDataset, groups: list[TrainingGroup]) -> list[list[str]]:
    """Hard negatives as columns, as sentence-transformers' losses want them: as many for each question.

    A question that has fewer gets passages of other groups, in turn, that stand in no document with its answers.
    """
    curated = dataset.hard_negatives or {}
    ids = [q for group in groups for q in group.query_ids]
    width = max((len(curated.get(q, ())) for q in ids), default=0)
    rows: list[list[str]] = []
    for number, query_id in enumerate(ids):
        row = [dataset.corpus[i] for i in curated.get(query_id, ())]
        documents = {dataset.source_of(i) for i in dataset.relevant_docs[query_id]}
        others = (groups[(number + step) % len(groups)] for step in range(1, len(groups)))
        easy = (g.passage for g in others if dataset.source_of(g.passage_id) not in documents and g.passage not in row)
        while len(row) < width and (text := next(easy, None)) is not None:
            row.append(text)
        rows.append(row)
    return [list(column) for column in zip(*rows, strict=False)]


def column_prompts(model: SentenceTransformer) -> dict[str, str]:
    """The prompts of serving for the columns that `training_inputs` makes for a loss of the user's own."""
    query, passage = model.prompts.get("query") or "", model.prompts.get("document") or ""
    return {"anchor": query, "positive": passage, **{f"negative_{n}": passage for n in range(1, 100)}}
