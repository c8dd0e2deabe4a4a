"""InfoNCE with the whole corpus as negatives, over passage vectors that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_MAX_SCORES = 1 << 24
"""Scores held at once: 64 MiB in float32. A step of 64 queries over 100,000 passages takes one pass of 6.4 million."""


@dataclass(frozen=True)
class Targets:
    """The relevant passages of a batch of queries, and the ones that are not compared with them.

    Attributes:
        relevant: int64 [2, n]: row of a query, column of a passage. Each row has at least one.
        relevance: float32 [n], above 0: the grade of each.
        ignored: int64 [2, m]: false negatives, in the same form.
    """

    relevant: Tensor
    relevance: Tensor
    ignored: Tensor

    @classmethod
    def of(
        cls,
        relevant: Sequence[Sequence[int]],
        relevance: Sequence[Sequence[float]] | None = None,
        ignored: Sequence[Sequence[int]] | None = None,
    ) -> Targets:
        """Targets from the columns of each query's relevant passages, their grades (1 if None) and false negatives."""
        grades = [1.0] * sum(map(len, relevant)) if relevance is None else [g for row in relevance for g in row]
        return cls(_places(relevant), torch.tensor(grades, dtype=torch.float32), _places(ignored or []))


def _places(columns: Sequence[Sequence[int]]) -> Tensor:
    pairs = [(row, column) for row, found in enumerate(columns) for column in found]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T


def full_corpus_loss(queries: Tensor, passages: Tensor, targets: Targets, temperature: float) -> Tensor:
    """The loss of `MaskedInfoNCELoss` where N, a query's negatives, is all of the corpus but its false negatives.

    The softmax is exact. Its gradient is known in closed form, (softmax - target) P / τ, and is computed in the forward
    pass in chunks of queries, so that memory beyond the vectors is bounded by `_MAX_SCORES` scores, or by those of one
    query where a corpus is larger than that.

    Args:
        queries: [q, dimension], any norm; only they get a gradient.
        passages: float32 [p, dimension] of length 1.
        targets: Of the queries, in their order.
        temperature: τ, above 0; divides cosine similarities.

    Returns:
        A scalar, the average over the queries.
    """
    with torch.autocast(queries.device.type, enabled=False):  # bfloat16 would round the scores to two digits
        unit = nn.functional.normalize(queries.float(), dim=-1)
        loss: Tensor = _FullCorpusSoftmax.apply(unit, passages, targets, temperature)  # type: ignore[no-untyped-call]
    return loss


def unit_scores(queries: Tensor, passages: Tensor, temperature: float) -> Tensor:
    """Cosine similarities [q, p] divided by τ, in float32 also under autocast; arguments as for `full_corpus_loss`."""
    with torch.autocast(queries.device.type, enabled=False):
        return nn.functional.normalize(queries.float(), dim=-1) @ passages.T / temperature


class _FullCorpusSoftmax(torch.autograd.Function):
    """The loss of queries of length 1, whose gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, passages: Tensor, targets: Targets, temperature: float) -> Tensor:
        count, (rows, columns) = len(queries), targets.relevant.to(queries.device)
        relevance = targets.relevance.to(queries)
        total = queries.new_zeros(count).index_add_(0, rows, relevance)
        weight = queries.new_zeros(count).scatter_reduce_(0, rows, relevance, "amax")
        target = relevance / total[rows]
        ignored = targets.ignored.to(queries.device)
        losses, gradient = queries.new_zeros(count), torch.empty_like(queries)
        chunk = max(1, _MAX_SCORES // max(1, len(passages)))
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            scores = (queries[part] @ passages.T).div_(temperature)
            hidden = (ignored[0] >= part.start) & (ignored[0] < part.stop)
            scores[ignored[0][hidden] - start, ignored[1][hidden]] = float("-inf")
            own = (rows >= part.start) & (rows < part.stop)
            at, column, share = rows[own] - start, columns[own], target[own]
            log_total = scores.logsumexp(dim=1)
            loss = log_total.clone().index_add_(0, at, -share * scores[at, column])  # the shares sum to 1
            losses[part] = weight[part] * loss
            probabilities = scores.sub_(log_total[:, None]).exp_()
            probabilities.index_put_((at, column), -share, accumulate=True)
            gradient[part] = (probabilities @ passages).mul_(weight[part, None] / (temperature * count))
        ctx.save_for_backward(gradient)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None
