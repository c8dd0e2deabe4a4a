"""Metrics of an embedding model on labelled pairs: how well cosine similarities agree with the labels."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.evaluation.embeddings import Embedder, unit_vectors
from llama_index_lora_embed.evaluation.metrics import metric_label
from llama_index_lora_embed.evaluation.retrieval import Encode
from llama_index_lora_embed.evaluation.search import FloatArray
from llama_index_lora_embed.evaluation.significance import Numbers

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_CHUNK = 8192  # pairs scored at a time; bounds the memory to twice 8,192 x dimensions floats


@dataclass(frozen=True, eq=False)
class PairEvaluation:
    """Metrics of one model on labelled pairs.

    Attributes:
        metrics: `roc_auc`, `average_precision` and `accuracy` (0 to 1) if the labels are 0 and 1; then `spearman` and
            `pearson`, the correlations of similarity and label (-1 to 1).
        similarities: Cosine similarity of the two texts of each pair, in the order of the pairs; [pairs], -1 to 1.
        labels: Labels of the pairs; [pairs], 0 to 1.
        threshold: Similarity from which a pair counts as positive in `accuracy`. It is optimal on these pairs, so
            `accuracy` is too high if they are few. None if the labels are graded.
        origins: Number of pairs by kind: "positive" and "negative", or "graded".
        digest: Digest of the pairs, so that only evaluations of the same pairs are compared.
        source: File that the pairs were read from; None if not known.
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
        """The metric of the verdict: "roc_auc" for labels of 0 and 1, "spearman" for grades."""
        return "roc_auc" if self.binary else "spearman"

    def scores(self, metric: str) -> list[float]:
        """An empty list: the metrics are defined on all pairs together."""
        return []

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.origins.items())
        metrics = [f"{metric_label(name):18}{value:6.3f}" for name, value in self.metrics.items()]
        return "\n".join([f"{len(self.labels)} pairs ({kinds})", *metrics])


def evaluate_pairs(
    embed_model: BaseEmbedding,
    pairs: LabelledPairs | Any,
    *,
    num_workers: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> PairEvaluation:
    """Evaluate any LlamaIndex embedding model on labelled pairs, by cosine similarity.

    The metrics agree with sentence-transformers' BinaryClassificationEvaluator and EmbeddingSimilarityEvaluator.

    Args:
        embed_model: Embeds all texts as passages; the first texts as queries if the pairs are not symmetric.
        pairs: Labelled pairs, or what `LabelledPairs.coerce` takes.
        num_workers: See `evaluate_retrieval`.
        cache_folder: See `evaluate_retrieval`.
        show_progress: Show progress bars.

    Raises:
        ConfigError: The pairs are a file or rows with unknown columns, or the vectors differ in length.
        DatasetError: The pairs cannot be evaluated on; see `LabelledPairs.check`.
        NonFiniteLossError: Vectors are NaN or infinite.
    """
    embedder = Embedder(embed_model, num_workers, cache_folder, show_progress)
    suspends = num_workers is not None
    return evaluate_pair_encoders(
        lambda texts: run_async(embedder.embed(texts, "query"), suspends=suspends),
        lambda texts: run_async(embedder.embed(texts, "passage"), suspends=suspends),
        LabelledPairs.coerce(pairs),
    )


def evaluate_pair_encoders(encode_queries: Encode, encode_passages: Encode, pairs: LabelledPairs) -> PairEvaluation:
    """Evaluate two functions from n texts to a float array [n, dimensions]; each distinct text is encoded once.

    Texts of symmetric pairs are all encoded as passages.

    Raises:
        DatasetError: The pairs cannot be evaluated on; see `LabelledPairs.check`.
        NonFiniteLossError: Vectors are NaN or infinite.
    """
    pairs.check("evaluation pairs")
    if pairs.symmetric:
        vectors1, rows = _encode_distinct(encode_passages, [*pairs.texts1, *pairs.texts2], "text")
        vectors2, (left, right) = vectors1, np.split(rows, 2)
    else:
        vectors1, left = _encode_distinct(encode_queries, pairs.texts1, "query")
        vectors2, right = _encode_distinct(encode_passages, pairs.texts2, "text")
    similarities = np.empty(len(pairs), dtype=np.float64)
    for start in range(0, len(pairs), _CHUNK):
        part = slice(start, start + _CHUNK)
        similarities[part] = np.einsum("ij,ij->i", vectors1[left[part]], vectors2[right[part]])
    similarities = similarities.clip(-1, 1)  # equal texts can exceed 1 by a rounding error
    labels = np.array(pairs.scores, dtype=np.float64)
    kinds = {"positive": pairs.positives, "negative": len(pairs) - pairs.positives}
    return PairEvaluation(
        pair_metrics(similarities, labels),
        similarities,
        labels,
        best_threshold(similarities, labels)[1] if pairs.binary else None,
        kinds if pairs.binary else {"graded": len(pairs)},
        pairs.digest(),
        pairs.source,
    )


def pair_metrics(similarities: Numbers, labels: Numbers) -> dict[str, float]:
    """Metrics of the agreement of similarities and labels, by scikit-learn and SciPy.

    roc_auc: probability that a positive pair has a higher similarity than a negative one, a tie counting half (Fawcett
    2006). average_precision: mean of the precision over the recall. accuracy: see `best_threshold`. spearman, pearson:
    correlations of ranks and of values; 0 if all similarities are equal. The first three are for labels of 0 and 1.
    """
    from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]
    from sklearn.metrics import average_precision_score, roc_auc_score

    metrics: dict[str, float] = {}
    if np.isin(labels, (0, 1)).all():
        metrics["roc_auc"] = float(roc_auc_score(labels, similarities))
        metrics["average_precision"] = float(average_precision_score(labels, similarities))
        metrics["accuracy"] = best_threshold(similarities, labels)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of constant input, which gives 0 here
        metrics["spearman"] = float(np.nan_to_num(spearmanr(labels, similarities).statistic))
        metrics["pearson"] = float(np.nan_to_num(pearsonr(labels, similarities).statistic))
    return metrics


def best_threshold(similarities: Numbers, labels: Numbers) -> tuple[float, float]:
    """The highest accuracy of any threshold, and the highest threshold that gives it.

    A pair is classified as positive if its similarity is at or above the threshold. Thresholds lie half-way between
    similarities; one above all of them classifies every pair as negative. sentence-transformers'
    BinaryClassificationEvaluator gives the same where there are no ties. Labels are 0 or 1.
    """
    distinct, groups = np.unique(-similarities, return_inverse=True)
    # correct minus wrong among the pairs at or above each distinct similarity; none are above all of them
    gained = np.append(0, np.cumsum(np.bincount(groups, weights=2 * labels - 1)))
    best = int(np.argmax(gained))
    accuracy = float(((labels == 0).sum() + gained[best]) / len(labels))
    if best == 0:
        return accuracy, float(np.nextafter(-distinct[0], np.inf))
    above, below = -distinct[best - 1], -distinct[min(best, len(distinct) - 1)]
    middle = (above + below) / 2
    return accuracy, float(above if middle == below else middle)  # adjacent floats have no middle


def _encode_distinct(encode: Encode, texts: list[str], name: str) -> tuple[FloatArray, NDArray[np.int64]]:
    """Unit vectors of the distinct texts, and the row of each text."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return unit_vectors(encode(list(row_of)), list(row_of), name), np.array([row_of[text] for text in texts])
