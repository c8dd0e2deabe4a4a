"""The loss over a whole corpus of frozen passage vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama_index_lora_embed.training.objectives import full_corpus
from llama_index_lora_embed.training.objectives.full_corpus import Targets, full_corpus_loss

RELEVANT = [[3], [0, 7], [5], [11, 2, 4], [1]]
GRADES = [[1.0], [0.5, 1.0], [0.25], [1.0, 0.5, 0.5], [1.0]]
IGNORED = [[4, 9], [], [0], [], [2, 3, 5]]


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(queries: Tensor, passages: Tensor, temperature: float) -> Tensor:
    """The formula of the docstring, query by query, with torch's own gradient."""
    unit, losses = torch.nn.functional.normalize(queries, dim=-1), []
    for query, found, grades, hidden in zip(unit, RELEVANT, GRADES, IGNORED, strict=True):
        kept = [i for i in range(len(passages)) if i not in hidden]
        scores = passages @ query / temperature
        log_total = torch.logsumexp(scores[kept], dim=0)
        share = torch.tensor(grades) / sum(grades)
        losses.append(-max(grades) * (share * (scores[found] - log_total)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("max_scores", [1 << 24, 24, 1])
def test_loss_and_gradient_are_those_of_the_formula_whatever_the_chunks(
    max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_corpus, "_MAX_SCORES", max_scores)
    passages = torch.nn.functional.normalize(vectors(12, 8, seed=1), dim=-1)
    expected_queries, queries = (vectors(5, 8).requires_grad_() for _ in range(2))
    expected = dense(expected_queries, passages, 0.05)
    loss = full_corpus_loss(queries, passages, Targets.of(RELEVANT, GRADES, IGNORED), 0.05)
    torch.testing.assert_close(loss, expected)
    (2 * expected).backward()  # type: ignore[no-untyped-call]
    (2 * loss).backward()  # type: ignore[no-untyped-call]
    assert queries.grad is not None
    assert expected_queries.grad is not None
    torch.testing.assert_close(queries.grad, expected_queries.grad)


def test_a_query_whose_other_passages_are_all_false_negatives_has_no_loss_and_no_gradient() -> None:
    passages = torch.nn.functional.normalize(vectors(3, 4), dim=-1)
    queries = vectors(1, 4, seed=2).requires_grad_()
    loss = full_corpus_loss(queries, passages, Targets.of([[1]], None, [[0, 2]]), 0.05)
    loss.backward()  # type: ignore[no-untyped-call]
    assert queries.grad is not None
    assert abs(loss.item()) < 1e-6
    assert queries.grad.abs().max() < 1e-6


def test_under_autocast_the_scores_stay_float32() -> None:
    passages = torch.nn.functional.normalize(vectors(50, 8, seed=3), dim=-1)
    queries, targets = vectors(2, 8, seed=4), Targets.of([[1], [2]])
    expected = full_corpus_loss(queries, passages, targets, 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(full_corpus_loss(queries, passages, targets, 0.02), expected)
