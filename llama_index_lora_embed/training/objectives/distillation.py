"""Objectives "distillation" and "margin_mse": a teacher's scores of each query's passages, and the losses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.training.examples import Example
from llama_index_lora_embed.training.negatives.mining import encode
from llama_index_lora_embed.training.objectives.collator import CURATED, IGNORED
from llama_index_lora_embed.training.objectives.info_nce import MaskedInfoNCELoss
from llama_index_lora_embed.training.teacher import Teacher

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

_RANGE = (1, 99)  # percentiles that become 0 and 1, as in CADET's code
_ANSWERS = 0.6  # share of the passage's score above which a hard negative answers the query, too; CADET's


@dataclass(frozen=True)
class TeacherScores:
    """A teacher's scores of examples.

    Attributes:
        of: Query id to text of a passage to its score, from 0 to 1.
        spread: Root mean square of the differences between an example's passage and its negatives.
        digest: SHA-256 (hex) of the scores as the teacher gave them.
    """

    of: Mapping[str, Mapping[str, float]]
    spread: float
    digest: str


def score_examples(
    dataset: EmbeddingQAFinetuneDataset, examples: Sequence[Example], teacher: Teacher, device: torch.device
) -> TeacherScores:
    """Have a teacher score the passage and the negatives of each example.

    Cross-encoders differ in what they return (logits of -11 to 11, or of -5 to 5). So that one temperature fits all of
    them, the first percentile of all scores becomes 0, the 99th 1, and those beyond are cut off.

    Raises:
        ConfigError: The teacher returns something other than finite numbers, or does not tell passages apart.
        ModelNotFoundError: The teacher does not load.
    """
    pairs = [(one.query_id, text) for one in examples for text in (one.passage, *(t for _, t in one.negatives))]
    raw = teacher.scores([(dataset.queries[query_id], text) for query_id, text in pairs], device)
    low, high = np.percentile(raw, _RANGE)
    scaled = np.clip((np.asarray(raw) - low) / max(high - low, np.finfo(float).tiny), 0, 1)
    of: dict[str, dict[str, float]] = {}
    for (query_id, text), score in zip(pairs, scaled.tolist(), strict=True):
        of.setdefault(query_id, {})[text] = score
    margins = [of[one.query_id][one.passage] - of[one.query_id][text] for one in examples for _, text in one.negatives]
    if not (spread := _root_mean_square(np.asarray(margins))):
        raise ConfigError(
            f"teacher {teacher.name}, which gives all passages of a query the same score",
            "scores that tell passages apart",
            "Look at a few scores by hand; a cross-encoder for pairs of a query and a passage is needed.",
        )
    listed = sorted(
        {(dataset.queries[query_id], text, score) for (query_id, text), score in zip(pairs, raw, strict=True)}
    )
    return TeacherScores(of, spread, hashlib.sha256(json.dumps(listed).encode()).hexdigest())


def with_negatives(dataset: EmbeddingQAFinetuneDataset, examples: Sequence[Example]) -> EmbeddingQAFinetuneDataset:
    """The dataset with the negatives of its examples as hard negatives."""
    negatives: dict[str, dict[str, None]] = {}
    for one in examples:
        negatives.setdefault(one.query_id, {}).update(dict.fromkeys(i for i, _ in one.negatives))
    return dataset.model_copy(update={"hard_negatives": {query_id: list(ids) for query_id, ids in negatives.items()}})


def student_spread(
    model: SentenceTransformer, dataset: EmbeddingQAFinetuneDataset, examples: Sequence[Example]
) -> float:
    """Root mean square of the differences between the cosines of an example's passage and of its negatives.

    Raises:
        NonFiniteLossError: The model's embeddings are NaN or infinite.
        ConfigError: All of its embeddings are the same.
    """
    settings = MiningSettings(show_progress_bar=False)
    query_ids = list(dict.fromkeys(one.query_id for one in examples))
    texts = list(dict.fromkeys(t for one in examples for t in (one.passage, *(text for _, text in one.negatives))))
    queries = dict(
        zip(query_ids, encode(model, [dataset.queries[i] for i in query_ids], "query", settings), strict=True)
    )
    passages = dict(zip(texts, encode(model, texts, "document", settings), strict=True))
    margins = [
        queries[one.query_id] @ (passages[one.passage] - passages[text])
        for one in examples
        for _, text in one.negatives
    ]
    if not (spread := _root_mean_square(np.asarray(margins, dtype=np.float64))):
        raise ConfigError(
            "a base that gives all passages the same embedding", "a trained embedding model", "Take another base."
        )
    return spread


def _root_mean_square(values: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


class DistillationLoss(MaskedInfoNCELoss):
    """What a teacher says of a query's passage and hard negatives, and InfoNCE with a small weight.

    loss(q) = distance(q) + w · InfoNCE(q), averaged over the queries. In InfoNCE, hard negatives are ignored whose
    score is above 0.6 of that of the query's passage: they answer the query, too (CADET, Tamber et al. 2025, arXiv
    2505.19274).

    Args:
        model: The student.
        temperature: Of the softmaxes over cosine similarities.
        contrastive_weight: w; 0 leaves InfoNCE out.
        **kwargs: As for `MaskedInfoNCELoss`.
    """

    def __init__(
        self, model: SentenceTransformer, temperature: float, *, contrastive_weight: float, **kwargs: Any
    ) -> None:
        super().__init__(model, temperature, **kwargs)
        self.contrastive_weight = contrastive_weight

    def _of_similarities(self, similarities: Tensor, labels: Tensor) -> Tensor:
        """The loss of cosine similarities [queries, passages].

        `labels` [2, queries, passages] are those of `MaskedInfoNCELoss`, and the teacher's scores, NaN where there is
        none.
        """
        labels, scores = labels
        own = labels > 0
        loss = self.distance(similarities, own, scores)
        if not self.contrastive_weight:
            return loss
        answers = (labels == CURATED) & (scores > _ANSWERS * _at(own, scores))
        contrastive = super()._of_similarities(similarities, labels.masked_fill(answers, IGNORED))
        return loss + self.contrastive_weight * contrastive

    def distance(self, similarities: Tensor, own: Tensor, scores: Tensor) -> Tensor:
        """How far the student is from the teacher, a scalar.

        Args:
            similarities: The student's cosines [queries, passages].
            own: Whether a passage is the one that the query is trained against; one in each row.
            scores: The teacher's, from 0 to 1; NaN where there is none.
        """
        raise NotImplementedError


class ListwiseDistillationLoss(DistillationLoss):
    """The teacher's distribution over a query's passages.

    For a query q, its passages G that the teacher has scored, their scores t, and the student's cosines,

        p_T = softmax_G(t / T),    p_S = softmax_G(cos(q, ·) / τ),    distance(q) = KL(p_T ‖ p_S)

    (RocketQAv2; Ren et al. 2021, arXiv 2110.07367, equation 5). CADET's code has T = 0.3, τ = 0.05 and w = 0.1.

    Args:
        model: The student.
        temperature: τ.
        teacher_temperature: T.
        **kwargs: As for `DistillationLoss`.
    """

    def __init__(
        self, model: SentenceTransformer, temperature: float, *, teacher_temperature: float, **kwargs: Any
    ) -> None:
        super().__init__(model, temperature, **kwargs)
        self.teacher_temperature = teacher_temperature

    def distance(self, similarities: Tensor, own: Tensor, scores: Tensor) -> Tensor:
        """Kullback-Leibler divergence, averaged over the queries."""
        missing = scores.isnan()

        def log_softmax(logits: Tensor) -> Tensor:
            # a passage without a score has probability 0, but 0 · −∞ is not 0
            return logits.masked_fill(missing, float("-inf")).log_softmax(dim=1).masked_fill(missing, 0.0)

        teacher, student = log_softmax(scores / self.teacher_temperature), log_softmax(similarities / self.temperature)
        return (teacher.exp().masked_fill(missing, 0.0) * (teacher - student)).sum(dim=1).mean()


class MarginDistillationLoss(DistillationLoss):
    """Squared differences between the student's margins and the teacher's (MarginMSE).

    For a query q, its passage p and each hard negative n that the teacher has scored,

        distance = mean( ((cos(q, p) − cos(q, n)) / σ_S − (t_p − t_n) / σ_T)² ),

    the loss of Hofstätter et al. 2020 (arXiv 2010.02666) and of GPL (Wang et al. 2021, arXiv 2112.07577) with both
    margins in units of their own spread. The papers' students compare by inner products, which grow to the range of the
    teacher's scores; cosines cannot. σ_S and σ_T are the root mean squares of the margins over the training data, the
    student's before training. So the student learns (t_p − t_n) · σ_S / σ_T as a difference of cosines, and keeps the
    range that its cosines have.

    Args:
        model: The student.
        temperature: Of InfoNCE.
        spreads: σ_S and σ_T.
        **kwargs: As for `DistillationLoss`.
    """

    def __init__(
        self, model: SentenceTransformer, temperature: float, *, spreads: tuple[float, float], **kwargs: Any
    ) -> None:
        super().__init__(model, temperature, **kwargs)
        self.spreads = spreads

    def distance(self, similarities: Tensor, own: Tensor, scores: Tensor) -> Tensor:
        """Mean over all pairs of a query's passage and a negative."""
        student, teacher = (
            (_at(own, values) - values) / spread
            for values, spread in zip((similarities, scores), self.spreads, strict=True)
        )
        errors = (student - teacher)[~scores.isnan() & ~own]
        return errors.square().sum() / max(1, len(errors))


def _at(own: Tensor, values: Tensor) -> Tensor:
    """The value of each row's own passage, [rows, 1]."""
    return values.masked_fill(~own, 0.0).sum(dim=1, keepdim=True)
