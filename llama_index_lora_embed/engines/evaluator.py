"""Evaluate a sentence-transformers model, in training or after it, on queries or on labelled pairs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.core.memory import return_freed_memory
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.training_data import TrainingData
from llama_index_lora_embed.embedding.encode import Task, Vectors, encode
from llama_index_lora_embed.evaluation.pairs import PairEvaluation, evaluate_pair_encoders
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_encoders
from llama_index_lora_embed.evaluation.search import FloatArray
from llama_index_lora_embed.evaluation.subset import selection_subset
from llama_index_lora_embed.models.kernels.attention import blocked_attention
from llama_index_lora_embed.models.kernels.precision import autocast, resolve_precision
from llama_index_lora_embed.models.tokens import check_texts, count_tokens
from llama_index_lora_embed.training.checkpointing.selection import Subset
from llama_index_lora_embed.training.lora import merged_adapter

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# texts of the longest length in a forward pass on an accelerator, whose memory a training shares
_LONGEST_TEXTS = 16


@dataclass(frozen=True)
class StepEvaluator:
    """Evaluates a model in training on all validation data, or on the subset of it that compares the steps.

    Attributes:
        dataset: Validation data.
        settings: Of the run.
        frozen: Vectors of passages where only queries are trained. Then all data costs little more than a subset.
    """

    dataset: TrainingData
    settings: TrainingSettings
    frozen: Callable[[list[str]], FloatArray] | None = None

    def __call__(
        self, model: SentenceTransformer, subset: Subset | None = None
    ) -> RetrievalEvaluation | PairEvaluation:
        """Evaluate a model on a subset, or on all validation data."""
        dataset = self.dataset
        if subset is not None and isinstance(dataset, EmbeddingQAFinetuneDataset):
            dataset = dataset.subset(subset["queries"], subset["passages"])
        return evaluate_model(
            model,
            dataset,
            precision=self.settings.precision,
            fused_attention=self.settings.fused_attention,
            show_progress=self.settings.show_progress_bar,
            frozen=self.frozen,
        )

    def subset_of(self, base: RetrievalEvaluation | PairEvaluation) -> Subset | None:
        """The subset on which steps are compared, from the base's evaluation on all data; None for all data."""
        size = self.settings.selection_passages
        if not size or self.frozen is not None or not isinstance(base, RetrievalEvaluation):
            return None
        assert isinstance(self.dataset, EmbeddingQAFinetuneDataset)
        part = selection_subset(self.dataset, base.rankings, size, self.settings.seed)
        return None if part is None else {"queries": list(part.queries), "passages": list(part.corpus)}


def evaluate_model(
    model: SentenceTransformer,
    dataset: TrainingData,
    *,
    precision: str = "fp32",
    fused_attention: bool = True,
    show_progress: bool = False,
    frozen: Callable[[list[str]], FloatArray] | None = None,
) -> RetrievalEvaluation | PairEvaluation:
    """Evaluate a model with the prompts that it is used with, computed as `LoraEmbedding` computes.

    Args:
        model: The model; its prompts "query" and "document" are used. An adapter that is not merged is, meanwhile.
        dataset: Queries with judgments, or labelled pairs.
        precision: "bf16", "fp32" or "auto" (`precision.resolve_precision`).
        fused_attention: See `TrainingSettings`; no effect in float32.
        show_progress: Show a progress bar for the passages.
        frozen: Vectors of passages, instead of the model's.

    Raises:
        DatasetError: The dataset is empty or inconsistent.
        NonFiniteLossError: Vectors are NaN or infinite.
    """
    max_tokens = None if model.device.type == "cpu" else _LONGEST_TEXTS * (model.max_seq_length or 512)

    def vectors(texts: list[str], task: Task) -> Vectors:
        bar = tqdm(total=len(texts), desc="evaluation", disable=not show_progress or task == "query")
        with bar, merged_adapter(model):
            return encode(model, check_texts(texts), task, max_tokens=max_tokens, progress=bar.update)

    def queries(texts: list[str]) -> Vectors:
        return vectors(texts, "query")

    def passages(texts: list[str]) -> Vectors:
        return vectors(texts, "document")

    with ExitStack() as stack:
        stack.callback(return_freed_memory)
        stack.enter_context(autocast(resolve_precision(precision, model.device, model), model.device))
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
