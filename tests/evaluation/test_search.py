import numpy as np
import pytest
import torch

from llama_index_lora_embed.evaluation import search


@pytest.mark.parametrize("block", [(3, 7), (256, 5), (1, 16_384)])
def test_search_in_blocks_is_exact_and_ranks_ties_in_the_order_of_rows(block, monkeypatch):
    monkeypatch.setattr(search, "_QUERIES", block[0])
    monkeypatch.setattr(search, "_PASSAGES", block[1])
    rng = np.random.default_rng(1)
    queries, passages = (rng.integers(0, 3, (n, 4)).astype(np.float32) for n in (9, 40))
    rows, scores = search.nearest(queries, passages, 10)
    every = queries @ passages.T
    expected = np.argsort(-every, axis=1, kind="stable")[:, :10]
    assert (rows == expected).all()
    assert (scores == np.take_along_axis(every, expected, axis=1)).all()
    assert search.nearest(queries, passages, 100)[0].shape == (9, 40)


def test_scores_are_float32_under_autocast():
    rng = np.random.default_rng(2)
    queries, passages = (rng.normal(size=(n, 64)).astype(np.float32) for n in (20, 300))
    expected = search.nearest(queries, passages, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = search.nearest(queries, passages, 20)
    assert (found[0] == expected[0]).all()
    assert (found[1] == expected[1]).all()
