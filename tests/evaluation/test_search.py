import hashlib
import json

import numpy as np
import pytest
import torch

from llama_index_lora_embed.core.errors import NonFiniteLossError
from llama_index_lora_embed.evaluation import search
from llama_index_lora_embed.evaluation.embeddings import unit_vectors
from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders, evaluation_digest, relevance
from tests.conftest import make_dataset


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


def test_passages_that_are_memory_mapped_are_searched_and_evaluated_where_they_are(tmp_path):
    dataset = make_dataset(passages=40)
    rng = np.random.default_rng(3)
    queries, passages = (rng.normal(size=(len(of), 24)).astype(np.float32) for of in (dataset.queries, dataset.corpus))
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    np.save(tmp_path / "unit.npy", passages)
    np.save(tmp_path / "longer.npy", passages * 3)
    expected = evaluate_encoders(lambda texts: queries.copy(), lambda texts: passages.copy(), dataset)
    unit = np.load(tmp_path / "unit.npy", mmap_mode="r")
    assert unit_vectors(unit, sorted(dataset.corpus), "passage") is unit, "they stay on disk"
    for name in ("unit.npy", "longer.npy"):
        mapped = np.load(tmp_path / name, mmap_mode="r")
        found = evaluate_encoders(lambda texts: queries.copy(), lambda texts, mapped=mapped: mapped, dataset)
        assert found.rankings == expected.rankings
        assert found.metrics == expected.metrics
    broken = passages.copy()
    broken[5, 0] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    with pytest.raises(NonFiniteLossError, match="1 of 40 passage"):
        unit_vectors(np.load(tmp_path / "broken.npy", mmap_mode="r"), sorted(dataset.corpus), "passage")


def test_the_digest_of_a_dataset_is_that_of_its_json():
    dataset = make_dataset(passages=6)
    content = [dataset.queries, dataset.corpus, relevance(dataset)]
    expected = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert evaluation_digest(dataset) == expected, "comparisons of earlier versions stay valid"
