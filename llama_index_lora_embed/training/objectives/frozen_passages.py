"""Training with `tune="query"`: the passages' vectors stay as an index holds them, and only queries are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.core.errors import NonFiniteLossError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.training.examples import TrainingGroup
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.corpus_targets import CorpusTargets, corpus_targets
from llama_index_lora_embed.training.objectives.full_corpus import full_corpus_loss
from llama_index_lora_embed.training.objectives.query_distillation import QueryTeacher

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FloatArray = npt.NDArray[np.float32]


class FrozenPassages:
    """Vectors of passages by text: those of an index, and for other texts those of the base, each computed once.

    Args:
        encode: The base's vectors of passages, [texts, dimension].
        stored: Vectors that an index holds, by text.
        choose_negatives: Takes the texts of the training queries, the vectors of all columns and their targets, and
            returns "corpus" or "answered"; None for "corpus".
        teacher: Tuned model that the queries learn from, instead of from labels; None for labels.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], FloatArray],
        stored: Mapping[str, FloatArray] | None = None,
        choose_negatives: Callable[[list[str], Tensor, CorpusTargets], str] | None = None,
        teacher: QueryTeacher | None = None,
    ) -> None:
        self.teacher = teacher
        self._encode = encode
        self.choose_negatives = choose_negatives or (lambda *_: "corpus")
        self._vectors = dict(stored or {})

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Vectors of length 1, float32 [texts, dimension].

        Raises:
            NonFiniteLossError: A vector is NaN or infinite, or has length 0.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            self._vectors.update(zip(new, self._encode(new), strict=True))
        vectors = np.stack([self._vectors[text] for text in texts]).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        wrong = [i for i, norm in enumerate(norms[:, 0]) if not np.isfinite(norm) or norm == 0]
        if wrong:
            raise NonFiniteLossError(
                f"{len(wrong)} of {len(texts)} passages whose vectors are NaN, infinite or of length 0, the first of "
                f"them {texts[wrong[0]][:80]!r}",
                "finite vectors that are not zero",
                "Check the base, or the index that the vectors come from.",
            )
        unit: FloatArray = vectors / norms
        return unit


class FrozenPassagesLoss(nn.Module):
    """`full_corpus_loss` of a batch of queries, for sentence-transformers' trainer.

    Args:
        model: Embeds the queries.
        vectors: float32 [columns, dimension], of length 1.
        targets: Of the queries of the training set.
        temperature: τ.
    """

    vectors: Tensor

    def __init__(
        self,
        model: SentenceTransformer,
        vectors: Tensor,
        targets: CorpusTargets,
        temperature: float,
    ) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.register_buffer("vectors", vectors, persistent=False)
        self.targets = targets
        self.temperature = temperature

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss, a scalar; `features` has the tokens of the queries, `labels` their numbers, int64 [queries]."""
        (tokens,) = features
        targets = self.targets.batch(labels.tolist())
        return full_corpus_loss(self.model(tokens)["sentence_embedding"], self.vectors, targets, self.temperature)


def frozen_passages_loss(
    model: SentenceTransformer,
    dataset: EmbeddingQAFinetuneDataset,
    groups: Sequence[TrainingGroup],
    false_negatives: FalseNegatives,
    passages: FrozenPassages,
    settings: TrainingSettings,
) -> tuple[list[str], FrozenPassagesLoss, str]:
    """The queries that are trained on, in the order of the loss's numbers, their loss, and what they are compared with.

    The last is "corpus" or "answered", see `TrainingSettings.negatives`.
    """
    targets = corpus_targets(dataset, groups, false_negatives)
    vectors = torch.from_numpy(passages([text for _, text in targets.columns])).to(model.device)
    rows = range(len(targets.query_ids))
    answered = targets.answered(rows)
    negatives: str = settings.negatives
    if negatives == "auto":
        texts = [dataset.queries[i] for i in targets.query_ids]
        some = len(answered) < len(targets.columns)
        negatives = passages.choose_negatives(texts, vectors, targets) if some else "corpus"
    if negatives == "answered":
        vectors, targets = vectors[answered], targets.part(rows, answered)
    return targets.query_ids, FrozenPassagesLoss(model, vectors, targets, settings.temperature), negatives
