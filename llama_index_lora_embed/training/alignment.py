"""Maps from one model's vectors to another's, learnt from texts that were embedded with both."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llama_index_lora_embed.models.embedding_adapter import BaseAdapter, LinearLayer, LinearThenResidual

AlignmentKind = Literal["identity", "orthogonal", "affine", "mlp"]
KINDS: tuple[AlignmentKind, ...] = get_args(AlignmentKind)
"""From the one with the fewest degrees of freedom to the one with the most."""

FloatArray = npt.NDArray[np.float32]

_RIDGES = np.logspace(-3, 2, 11)  # for vectors of length 1
_HIDDEN = 256
_LEARNING_RATE = 3e-4
_BATCH = 128
_EPOCHS = 100
_PATIENCE = 10  # epochs without a gain on the pairs that are held out
_HELD_OUT = 10  # one pair in so many


def learn_map(kind: AlignmentKind, new: FloatArray, old: FloatArray, *, seed: int = 0) -> BaseAdapter:
    """A map that takes vectors of the new model near to those of the old one.

    - "identity": no map, for a model that was trained further and is still near to what it was; it needs as many
      dimensions as the old model has.
    - "orthogonal": the rotation between the centred vectors that leaves the least squared distance (Procrustes
      analysis; Schönemann 1966), which keeps angles and thus the new model's own neighbourhoods. Between different
      dimensions it is semi-orthogonal.
    - "affine": least squares with a ridge, which is chosen by leaving out one pair at a time
      (scikit-learn's `RidgeCV`).
    - "mlp": a small residual network on top of the orthogonal map, trained on the cosine and stopped on held-out pairs.

    Centring the rotation kept more of the recall (0.53 instead of 0.48 between unlike models, 0.992 instead of 0.988
    between alike ones; benchmarks/README.md, "A bridge").

    Args:
        kind: One of `KINDS`.
        new: Vectors of length 1, [pairs, dimensions of the new model].
        old: Vectors of length 1 of the same texts, [pairs, dimensions of the old model].
        seed: Random seed of "mlp".
    """
    with torch.random.fork_rng(devices=[]):  # layers start from random numbers
        torch.manual_seed(seed)
        if kind == "affine":
            from sklearn.linear_model import RidgeCV

            fitted = RidgeCV(alphas=_RIDGES).fit(new, old)
            return _linear(fitted.coef_, fitted.intercept_)
        if kind == "identity":
            return _linear(np.eye(old.shape[1], new.shape[1]), np.zeros(old.shape[1]))
        rotation = _procrustes(new, old)
        return rotation if kind == "orthogonal" else _with_residual(rotation, new, old)


def _procrustes(new: FloatArray, old: FloatArray) -> LinearLayer:
    middle_new, middle_old = new.mean(axis=0), old.mean(axis=0)
    left, _, right = np.linalg.svd((old - middle_old).T @ (new - middle_new), full_matrices=False)
    weight = left @ right
    return _linear(weight, middle_old - weight @ middle_new)


def _linear(weight: npt.ArrayLike, bias: npt.ArrayLike) -> LinearLayer:
    weight, bias = np.asarray(weight, np.float32), np.asarray(bias, np.float32)
    layer = LinearLayer(weight.shape[1], weight.shape[0], bias=True)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.from_numpy(weight))
        layer.linear.bias.copy_(torch.from_numpy(bias))
    return layer


def _with_residual(rotation: LinearLayer, new: FloatArray, old: FloatArray) -> LinearThenResidual:
    adapter = LinearThenResidual(new.shape[1], _HIDDEN, old.shape[1])
    adapter.first = rotation
    nn.init.ones_(adapter.then.residual_weight)  # with W2 = 0 the start is the identity, and every weight learns
    nn.init.zeros_(adapter.then.linear2.weight)
    nn.init.zeros_(adapter.then.linear2.bias)
    given, wanted = torch.from_numpy(new), torch.from_numpy(old)
    order = torch.randperm(len(new))
    held_out, learnt = order[: len(order) // _HELD_OUT], order[len(order) // _HELD_OUT :]
    optimizer = torch.optim.AdamW(adapter.then.parameters(), lr=_LEARNING_RATE)

    def distance(rows: Tensor) -> Tensor:
        return 1 - nn.functional.cosine_similarity(adapter(given[rows]), wanted[rows]).mean()

    best, kept, waited = float("inf"), dict[str, Tensor](), 0
    for _ in range(_EPOCHS):
        with torch.no_grad():
            found = float(distance(held_out))
        if found < best:
            best, waited = found, 0
            kept = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        elif (waited := waited + 1) == _PATIENCE:
            break
        for rows in learnt[torch.randperm(len(learnt))].split(_BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            distance(rows).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    adapter.load_state_dict(kept)
    return adapter
