"""How well the cosine similarity of an embedding model agrees with the labels of pairs."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.evaluation.embeddings import Embedder
from llama_index_lora_embed.evaluation.retrieval import Encode, unit_vectors

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_CHUNK = 8192  # pairs scored at a time; bounds the memory at twice 8,192 x dimensions floats

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PairEvaluation:
    """Measures of one model on labelled pairs.

    Attributes:
        metrics: Spearman's and Pearson's correlation of similarity and label (`spearman`, `pearson`; -1 to 1), and
            before them, if the labels are 0 and 1, `roc_auc`, `average_precision` and `accuracy` (0 to 1).
        similarities: Cosine of the two texts of each pair, in the order of the pairs; [pairs], -1 to 1.
        labels: Their labels; [pairs], 0 to 1.
        threshold: Similarity from which on a pair counts as a 1 in `accuracy`: the best one on these very pairs, so
            that `accuracy` flatters where they are few. None if the labels are graded.
        origins: Number of pairs by kind: "positive" and "negative", or "graded".
        digest: Of the pairs, so that only evaluations of the same ones are compared.
        source: Where the pairs were read from; None if not known.
    """

    metrics: dict[str, float]
    similarities: Numbers = field(repr=False)
    labels: Numbers = field(repr=False)
    threshold: float | None
    origins: dict[str, int]
    digest: str = field(repr=False)
    source: str | None = None

    @property
    def binary(self) -> bool:
        """Whether the labels are 0 and 1."""
        return "graded" not in self.origins

    @property
    def metric(self) -> str:
        """The measure that a verdict rests on: "roc_auc" for labels of 0 and 1, "spearman" for graded ones."""
        return "roc_auc" if self.binary else "spearman"

    def scores(self, measure: str) -> list[float]:
        """Nothing: these are measures of all pairs together, and no pair has one of its own."""
        return []


def evaluate_pairs(
    embed_model: BaseEmbedding,
    pairs: LabelledPairs | Any,
    *,
    num_workers: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> PairEvaluation:
    """Evaluate any LlamaIndex embedding model on labelled pairs, by cosine similarity.

    Args:
        embed_model: Its text side is used; its query side too, for the first texts, if the pairs are not symmetric.
        pairs: Labelled pairs, or what `LabelledPairs.coerce` takes.
        num_workers: As of `evaluate_retrieval`.
        cache_folder: As of `evaluate_retrieval`.
        show_progress: Show a bar while texts are embedded.

    Returns:
        Measures that agree with sentence-transformers' BinaryClassificationEvaluator and
        EmbeddingSimilarityEvaluator.

    Raises:
        ConfigError: The pairs are a file or rows with unknown columns; or the model's vectors differ in length.
        DatasetError: The pairs cannot be judged by; see `LabelledPairs.check`.
        NonFiniteLossError: Vectors are NaN or infinite.
    """
    maker = Embedder(embed_model, num_workers=num_workers, cache_folder=cache_folder, show_progress=show_progress)
    suspends = num_workers is not None
    return evaluate_pair_encoders(
        lambda texts: run_async(maker.vectors(texts, "query"), suspends=suspends),
        lambda texts: run_async(maker.vectors(texts, "passage"), suspends=suspends),
        LabelledPairs.coerce(pairs),
    )


def evaluate_pair_encoders(encode_queries: Encode, encode_passages: Encode, pairs: LabelledPairs) -> PairEvaluation:
    """Evaluate two functions from texts to vectors; each gets every text once.

    Args:
        encode_queries: n texts to a float array [n, dimensions]; not called if the pairs are symmetric.
        encode_passages: The same for passages.
        pairs: Labelled pairs.

    Raises:
        DatasetError: The pairs cannot be judged by; see `LabelledPairs.check`.
        NonFiniteLossError: Vectors are NaN or infinite.
    """
    pairs.check("evaluation pairs")
    if pairs.symmetric:
        rows1 = rows2 = _rows([*pairs.texts1, *pairs.texts2])
        vectors1 = vectors2 = unit_vectors(encode_passages(list(rows1)), list(rows1), "text")
    else:
        rows1, rows2 = _rows(pairs.texts1), _rows(pairs.texts2)
        vectors1 = unit_vectors(encode_queries(list(rows1)), list(rows1), "query")
        vectors2 = unit_vectors(encode_passages(list(rows2)), list(rows2), "text")
    left = np.array([rows1[text] for text in pairs.texts1])
    right = np.array([rows2[text] for text in pairs.texts2])
    similarities = np.empty(len(pairs), dtype=np.float64)
    for start in range(0, len(pairs), _CHUNK):
        part = slice(start, start + _CHUNK)
        similarities[part] = np.einsum("ij,ij->i", vectors1[left[part]], vectors2[right[part]])
    similarities = similarities.clip(-1, 1)  # equal texts come out a rounding error above 1
    labels = np.array(pairs.scores, dtype=np.float64)
    positives = pairs.positives
    return PairEvaluation(
        pair_metrics(similarities, labels),
        similarities,
        labels,
        best_threshold(similarities, labels)[1] if pairs.binary else None,
        {"positive": positives, "negative": len(pairs) - positives} if pairs.binary else {"graded": len(pairs)},
        pairs.digest(),
        pairs.source,
    )


def pair_metrics(similarities: Numbers, labels: Numbers) -> dict[str, float]:
    """Measures of the agreement of similarities and labels, by scikit-learn and SciPy.

    roc_auc: how often a 1 has a higher similarity than a 0, a tie counting half (Fawcett, 2006).
    average_precision: mean precision over the recall gained. accuracy: see `best_threshold`. spearman, pearson:
    correlations of ranks and of values; 0 if all similarities are equal, which tells the labels nothing.

    Args:
        similarities: [pairs].
        labels: [pairs], two different ones at least; the first three measures need 0 and 1 only.
    """
    from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]
    from sklearn.metrics import average_precision_score, roc_auc_score  # type: ignore[import-untyped]

    found: dict[str, float] = {}
    if np.isin(labels, (0, 1)).all():
        found["roc_auc"] = float(roc_auc_score(labels, similarities))
        found["average_precision"] = float(average_precision_score(labels, similarities))
        found["accuracy"] = best_threshold(similarities, labels)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of equal values, which are provided for
        found["spearman"] = float(np.nan_to_num(spearmanr(labels, similarities).statistic))
        found["pearson"] = float(np.nan_to_num(pearsonr(labels, similarities).statistic))
    return found


def best_threshold(similarities: Numbers, labels: Numbers) -> tuple[float, float]:
    """The highest accuracy that one threshold gives, and that threshold; the highest one if several give it.

    A pair counts as a 1 if its similarity is at the threshold or above. Thresholds lie half-way between
    similarities, as in sentence-transformers' BinaryClassificationEvaluator; one just above all calls every pair a 0.

    Args:
        similarities: [pairs].
        labels: [pairs] of 0 and 1.
    """
    order = np.argsort(-similarities, kind="stable")
    ordered = similarities[order]
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # equal similarities are on one side
    gained = np.cumsum(2 * labels[order] - 1)[ends]  # right minus wrong among those above
    negatives = float((labels == 0).sum())
    best = int(np.argmax(gained))
    if gained[best] <= 0:
        return negatives / len(labels), float(np.nextafter(ordered[0], np.inf))
    end = ends[best]
    below = ordered[end + 1] if end + 1 < len(ordered) else ordered[end]
    middle = (ordered[end] + below) / 2
    # between neighbouring floats there is no middle
    threshold = ordered[end] if middle == below else middle
    return float((negatives + gained[best]) / len(labels)), float(threshold)


def _rows(texts: list[str]) -> dict[str, int]:
    """Each distinct text and its place among them."""
    return {text: row for row, text in enumerate(dict.fromkeys(texts))}
