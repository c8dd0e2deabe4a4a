"""Training with `tune="query"` and a teacher: queries learn to find in an index what a tuned model finds."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.questions.base import split_sentences
from llama_index_lora_embed.training.objectives.full_corpus import unit_scores

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FloatArray = npt.NDArray[np.float32]

_SENTENCES = 4  # of each passage; on folds of tenk_train 4 gained 0.065, 2 gained 0.059 and none 0.047
_WORDS = (5, 40)  # of a sentence: shorter ones say nothing, longer ones are no queries
_MOST_SENTENCES = 10_000  # more would only make an epoch longer than 300 steps


@dataclass(frozen=True)
class QueryTeacher:
    """A model that was tuned on both sides.

    Attributes:
        name: For the manifest.
        encode_queries: Vectors of queries, [texts, dimensions], any dimensions and norm.
        encode_passages: The same of passages.
    """

    name: str
    encode_queries: Callable[[list[str]], FloatArray]
    encode_passages: Callable[[list[str]], FloatArray]


class QueryDistillationLoss(nn.Module):
    """Listwise distillation over all passages of an index, for sentence-transformers' trainer.

    With the teacher's cosines t of a query q and all passages, and the student's over the vectors of the index,

        loss(q) = KL( softmax(t / τ) ‖ softmax(cos(q, ·) / τ) )

    the distillation of RocketQAv2 (Ren et al. 2021, arXiv 2110.07367, equation 5) from a bi-encoder that reads passages
    otherwise. No label takes part.

    Args:
        model: Embeds the queries.
        vectors: float32 [passages, dimensions], of length 1: those of the index.
        queries: The teacher's vectors of the training texts, float32 [texts, teacher's dimensions], of length 1.
        passages: Its vectors of the passages, float32 [passages, teacher's dimensions], of length 1.
        temperature: τ.
    """

    vectors: Tensor
    queries: Tensor
    passages: Tensor

    def __init__(
        self, model: SentenceTransformer, vectors: Tensor, queries: Tensor, passages: Tensor, *, temperature: float
    ) -> None:
        super().__init__()
        self.model: nn.Module = model
        for name, tensor in (("vectors", vectors), ("queries", queries), ("passages", passages)):
            self.register_buffer(name, tensor, persistent=False)
        self.temperature = temperature

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss, a scalar; `features` has the tokens of the texts, `labels` their numbers, int64 [texts]."""
        (tokens,) = features
        with torch.no_grad():
            teacher = (self.queries[labels] @ self.passages.T).div_(self.temperature).log_softmax(dim=1)
        student = unit_scores(self.model(tokens)["sentence_embedding"], self.vectors, self.temperature)
        return nn.functional.kl_div(student.log_softmax(dim=1), teacher, reduction="batchmean", log_target=True)


def query_distillation_loss(
    model: SentenceTransformer,
    dataset: EmbeddingQAFinetuneDataset,
    vectors_of: Callable[[Sequence[str]], FloatArray],
    teacher: QueryTeacher,
    temperature: float,
    seed: int,
) -> tuple[list[str], QueryDistillationLoss, str]:
    """What is trained on, in the order of the loss's numbers: the training queries, then sentences of the passages.

    The sentences, up to four of each passage and 10,000 in all, stand for queries that nobody has asked yet. They need
    no label, because what a query should find is what the teacher finds.

    Args:
        model: The student.
        dataset: Its corpus is what queries are compared with.
        vectors_of: The index's vectors of passages, of length 1.
        teacher: Scores them.
        temperature: Of both softmaxes.
        seed: Of the choice of sentences.

    Returns:
        The texts, the loss, and the SHA-256 (hexadecimal) of the texts and of what the teacher says about them.

    Raises:
        ConfigError: The teacher's vectors cannot be used.
    """
    passages = list(dict.fromkeys(dataset.corpus.values()))
    texts = [*dict.fromkeys(dataset.queries.values()), *_sentences(passages, random.Random(seed))]
    found = [
        _checked(teacher, encode(given), len(given))
        for encode, given in ((teacher.encode_queries, texts), (teacher.encode_passages, passages))
    ]
    if found[0].shape[1] != found[1].shape[1]:
        raise _unusable(teacher, f"vectors of {found[0].shape[1]} numbers for queries and {found[1].shape[1]} others")
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass"))
    for array in found:
        digest.update(array.tobytes())
    vectors, *learnt = (torch.from_numpy(array).to(model.device) for array in (vectors_of(passages), *found))
    return texts, QueryDistillationLoss(model, vectors, *learnt, temperature=temperature), digest.hexdigest()


def _sentences(passages: list[str], rng: random.Random) -> list[str]:
    fewest, most = _WORDS
    found: list[str] = []
    for passage in passages:
        fitting = [s for s in split_sentences(passage) if fewest <= len(s.split()) <= most]
        found += rng.sample(fitting, min(_SENTENCES, len(fitting)))
    found = list(dict.fromkeys(found))
    return found if len(found) <= _MOST_SENTENCES else rng.sample(found, _MOST_SENTENCES)


def _checked(teacher: QueryTeacher, vectors: Any, count: int) -> FloatArray:
    array = np.asarray(vectors, dtype=np.float32)
    if array.ndim != 2 or len(array) != count:
        raise _unusable(teacher, f"an array of shape {array.shape} for {count} texts")
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise _unusable(teacher, "vectors that are NaN, infinite or of length 0")
    unit: FloatArray = array / norms
    return unit


def _unusable(teacher: QueryTeacher, what: str) -> ConfigError:
    return ConfigError(
        f"teacher {teacher.name}, which returned {what}",
        "a finite vector for each text, of one number of dimensions",
        "Check it with evaluate_retrieval(teacher, dataset).",
    )
