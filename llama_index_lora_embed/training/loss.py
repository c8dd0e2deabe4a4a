"""The default loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama_index_lora_embed.training.batches import IGNORED

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class MaskedInfoNCELoss(nn.Module):
    """In-batch negatives with a mask for passages that are no true negatives.

    For a question q with its passage p⁺ and the set N of the batch's negatives,

        loss(q) = −log( exp(cos(q, p⁺)/τ) / (exp(cos(q, p⁺)/τ) + Σ_{p ∈ N} exp(cos(q, p)/τ)) ),

    averaged over the questions, each weighed by how relevant its passage is (van den Oord et al., 2018, equation 4;
    sentence-transformers' MultipleNegativesRankingLoss is the same without mask and weights and with one question a
    passage).

    Args:
        model: The model to train.
        temperature: τ, above 0.
    """

    def __init__(self, model: SentenceTransformer, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            features: Token tensors, chunks of questions first, then chunks of passages.
            labels: float [questions, passages]: above 0 its passage, and how relevant it is (at most 1); 0 a negative;
                -1 to be ignored.

        Returns:
            A scalar.
        """
        vectors = torch.cat([self.model(chunk)["sentence_embedding"] for chunk in features])
        # float32: a bfloat16 product would round the scores to two digits
        vectors = nn.functional.normalize(vectors.float(), dim=-1)
        queries, passages = vectors[: len(labels)], vectors[len(labels) :]
        with torch.autocast(vectors.device.type, enabled=False):
            scores = queries @ passages.T / self.temperature
        scores = scores.masked_fill(labels == IGNORED, float("-inf"))
        relevance, passage = labels.max(dim=1)
        return (relevance * nn.functional.cross_entropy(scores, passage, reduction="none")).mean()
