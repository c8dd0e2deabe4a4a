"""What a map keeps of retrieval."""

from __future__ import annotations

import numpy as np
import pytest

from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.evaluation.alignment import neighbours_kept, recalls


def vectors(count: int, dimensions: int = 6, seed: int = 0) -> np.ndarray:
    return unit_norm(np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32))


def test_recall_is_the_share_of_a_query_s_relevant_passages_among_the_nearest() -> None:
    passages = np.eye(4, dtype=np.float32)
    queries = unit_norm(np.array([[4, 3, 2, 1], [1, 2, 3, 4]], dtype=np.float32))
    assert recalls(queries, passages, [{0, 3}, {2}], 2).tolist() == [0.5, 1.0]
    assert recalls(queries, passages, [{0, 3}, {0}], 3).tolist() == [0.5, 0.0]


def test_neighbours_are_kept_by_a_rotation_and_lost_by_a_random_map() -> None:
    new = vectors(200)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0].astype(np.float32)
    rows = range(20, 60)
    assert neighbours_kept(new[rows], new[rows] @ turn, new, new @ turn, rows, 5) == pytest.approx(1.0, abs=0.02)
    assert neighbours_kept(new[rows], vectors(40, seed=2), new, new @ turn, rows, 5) < 0.2


def test_a_passage_is_not_its_own_neighbour() -> None:
    new = np.eye(3, dtype=np.float32)
    old = unit_norm(np.array([[1, 0, 0.1], [0, 1, 0], [0.1, 0, 1]], dtype=np.float32))
    # of passage 0, new has no preference (row 1 comes first), and old prefers row 2
    assert neighbours_kept(new[:1], old[:1], new, old, [0], 1) == 0.0
