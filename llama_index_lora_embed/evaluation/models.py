"""Evaluate and compare models on either kind of data: queries and passages, or labelled pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.data.training_data import TrainingData
from llama_index_lora_embed.evaluation.compare import compare
from llama_index_lora_embed.evaluation.pairs import PairEvaluation, evaluate_pairs
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval
from llama_index_lora_embed.evaluation.retrieval_comparison import RetrievalComparison, compare_retrieval
from llama_index_lora_embed.evaluation.verdict import Comparison

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding


def evaluate_model(
    embed_model: BaseEmbedding, data: TrainingData, **settings: Any
) -> RetrievalEvaluation | PairEvaluation:
    """Evaluate a model by `evaluate_retrieval`, or by `evaluate_pairs` on labelled pairs.

    Args:
        embed_model: Any LlamaIndex embedding model.
        data: Queries and passages, or labelled pairs.
        **settings: Of the two functions: `num_workers`, `cache_folder`, `show_progress`.

    Raises:
        LoraEmbedError: As the two functions.
    """
    if isinstance(data, LabelledPairs):
        return evaluate_pairs(embed_model, data, **settings)
    return evaluate_retrieval(embed_model, data, **settings)


def compare_models(
    base: BaseEmbedding, tuned: BaseEmbedding, data: TrainingData, **settings: Any
) -> RetrievalComparison | tuple[PairEvaluation, PairEvaluation]:
    """Compare two models by `compare_retrieval`; on labelled pairs evaluate both. `write_report` takes either.

    Args:
        base: The model to compare with.
        tuned: The model that should be better.
        data: Queries and passages, or labelled pairs.
        **settings: Of `compare_retrieval`; labelled pairs have neither `regression_set` nor `names`.

    Raises:
        LoraEmbedError: As `compare_retrieval` and `evaluate_pairs`.
    """
    if not isinstance(data, LabelledPairs):
        return compare_retrieval(base, tuned, data, **settings)
    if settings.pop("regression_set", None) is not None:
        raise ConfigError("labelled pairs with a regression set", "queries and passages", "Leave it out.")
    settings.pop("names", None)
    return evaluate_pairs(base, data, **settings), evaluate_pairs(tuned, data, **settings)


def comparison_of(found: RetrievalComparison | tuple[PairEvaluation, PairEvaluation]) -> Comparison:
    """The comparison with its verdict in what `compare_models` returned."""
    return found.comparison if isinstance(found, RetrievalComparison) else compare(*found)


def evaluations_of(
    found: RetrievalComparison | tuple[PairEvaluation, PairEvaluation],
) -> Mapping[str, RetrievalEvaluation | PairEvaluation]:
    """The evaluations in what `compare_models` returned, by the names of the models."""
    if isinstance(found, RetrievalComparison):
        return dict(zip(found.names, (found.base, found.tuned), strict=True))
    return {"base": found[0], "tuned": found[1]}
