"""Arrays of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def unit_norm(vectors: npt.NDArray[Any], *, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Vectors [rows, dimensions] scaled to length 1; a zero vector stays zero.

    Args:
        vectors: Floating-point numbers; the precision is kept.
        out: Where to write the result, e.g. `vectors` itself; None for a new array.
    """
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scaled: npt.NDArray[Any] = np.divide(vectors, norms, out=out)
    return scaled
