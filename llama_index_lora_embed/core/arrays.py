"""Arrays of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def cosine(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> float:
    """Cosine similarity of two vectors [dimensions]; 0 where one is zero, or where they differ in length."""
    if left.shape != right.shape:
        return 0.0
    lengths = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / max(lengths, 1e-12)


def unit_norm(vectors: npt.NDArray[Any], *, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Vectors [rows, dimensions] scaled to length 1, in their own precision, into `out` or a new array.

    A zero vector stays zero.
    """
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scaled: npt.NDArray[Any] = np.divide(vectors, norms, out=out)
    return scaled
