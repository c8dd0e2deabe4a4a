"""Evaluate a sentence-transformers model, in training or after it, on queries or on labelled pairs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.data.training_data import TrainingData
from llama_index_lora_embed.evaluation.pairs import PairEvaluation, evaluate_pair_encoders
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_encoders
from llama_index_lora_embed.evaluation.search import FloatArray
from llama_index_lora_embed.models.kernels.attention import blocked_attention
from llama_index_lora_embed.models.kernels.precision import autocast, resolve_precision
from llama_index_lora_embed.models.tokens import count_tokens

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_BATCH = 16  # passages encoded at once


def evaluate_model(
    model: SentenceTransformer,
    dataset: TrainingData,
    *,
    precision: str = "fp32",
    fused_attention: bool = True,
    show_progress: bool = False,
    frozen: Callable[[list[str]], FloatArray] | None = None,
) -> RetrievalEvaluation | PairEvaluation:
    """Evaluate a model with the prompts that it is used with.

    Args:
        model: The model; its prompts "query" and "document" are used.
        dataset: Queries with judgments, or labelled pairs.
        precision: "bf16", "fp32" or "auto" (`precision.resolve_precision`).
        fused_attention: See `TrainingSettings`; no effect in float32.
        show_progress: Show a progress bar for the passages.
        frozen: Vectors of passages, instead of the model's.

    Raises:
        DatasetError: The dataset is empty or inconsistent.
        NonFiniteLossError: Vectors are NaN or infinite.
    """

    def queries(texts: list[str]) -> Any:
        return model.encode_query(texts, show_progress_bar=False)

    def passages(texts: list[str]) -> Any:
        return model.encode_document(texts, show_progress_bar=show_progress, batch_size=_BATCH)

    with ExitStack() as stack:
        stack.enter_context(autocast(resolve_precision(precision, model.device), model.device))
        if fused_attention:
            stack.enter_context(blocked_attention(model))
        if dataset.kind == "pairs":
            return evaluate_pair_encoders(queries, passages, dataset)
        return evaluate_encoders(queries, frozen or passages, dataset)


def longest_text(model: SentenceTransformer, dataset: TrainingData) -> int:
    """Tokens of the longest text that an evaluation embeds, with prompt and special tokens and without truncation."""
    if dataset.kind == "queries":
        sides = [("query", list(dataset.queries.values())), ("document", list(dataset.corpus.values()))]
    else:
        sides = [("document" if dataset.symmetric else "query", dataset.texts1), ("document", dataset.texts2)]
    return max(max(count_tokens(model, texts, model.prompts.get(name) or "")) for name, texts in sides)


def default_metric(dataset: TrainingData | None) -> str:
    """The metric that selects the best step: nDCG@10, ROC-AUC for labels of 0 and 1, Spearman for grades."""
    if dataset is not None and dataset.kind == "pairs":
        return "roc_auc" if dataset.binary else "spearman"
    return "ndcg@10"
