"""Maps between the vectors of two models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.models.embedding_adapter import BaseAdapter, LinearLayer
from llama_index_lora_embed.training.alignment import KINDS, learn_map


def vectors(count: int = 400, dimensions: int = 12, seed: int = 0) -> np.ndarray:
    return unit_norm(np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32))


def rotation(dimensions: int = 12) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(dimensions, dimensions)))[0].astype(np.float32)


def mapped(adapter: BaseAdapter, given: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return unit_norm(adapter(torch.from_numpy(given)).numpy())


def cosine(adapter: BaseAdapter, new: np.ndarray, old: np.ndarray) -> float:
    return float((mapped(adapter, new) * old).sum(axis=1).mean())


def test_no_map_leaves_vectors_as_they_are() -> None:
    assert KINDS[0] == "identity"
    new = vectors()
    np.testing.assert_array_equal(mapped(learn_map("identity", new, new @ rotation()), new), unit_norm(new))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_rotation_is_found_and_holds_for_vectors_that_were_not_learnt_from(kind: str) -> None:
    new, turn = vectors(), rotation()
    adapter = learn_map(kind, new[:300], new[:300] @ turn)  # type: ignore[arg-type]
    assert cosine(adapter, new[300:], new[300:] @ turn) > 0.999


@pytest.mark.parametrize(("given", "returned"), [(12, 8), (8, 12)])
def test_between_different_dimensions_the_rotation_is_semi_orthogonal(given: int, returned: int) -> None:
    adapter = learn_map("orthogonal", vectors(dimensions=given), vectors(dimensions=returned, seed=3))
    assert isinstance(adapter, LinearLayer)
    weight = adapter.linear.weight.detach().numpy()
    assert weight.shape == (returned, given)
    square = weight @ weight.T if returned < given else weight.T @ weight
    np.testing.assert_allclose(square, np.eye(min(given, returned)), atol=1e-5)


def test_an_affine_map_is_found_by_least_squares_and_not_by_a_rotation() -> None:
    new = vectors()
    stretched = unit_norm(new * np.linspace(0.2, 3, 12, dtype=np.float32) + 0.3)
    affine, turned = (learn_map(kind, new[:300], stretched[:300]) for kind in ("affine", "orthogonal"))  # type: ignore[arg-type]
    assert cosine(affine, new[300:], stretched[300:]) > cosine(turned, new[300:], stretched[300:]) + 0.02


def test_a_residual_network_finds_what_no_rotation_does_the_same_in_every_run() -> None:
    new = vectors(800, dimensions=6)
    bent = unit_norm(np.abs(new) @ rotation(6))
    state = torch.random.get_rng_state()
    network, again, turned = (learn_map(kind, new[:600], bent[:600]) for kind in ("mlp", "mlp", "orthogonal"))  # type: ignore[arg-type]
    assert torch.equal(state, torch.random.get_rng_state())
    assert cosine(network, new[600:], bent[600:]) > cosine(turned, new[600:], bent[600:]) + 0.05
    np.testing.assert_array_equal(mapped(network, new), mapped(again, new))
