"""Arrays of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def unit_norm(vectors: npt.NDArray[Any], *, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Vectors [rows, dimensions] scaled to length 1, in their own precision, into `out` or a new array.

    A zero vector stays zero.
    """
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scaled: npt.NDArray[Any] = np.divide(vectors, norms, out=out)
    return scaled
