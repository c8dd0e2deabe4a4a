"""What a map between two models' vectors keeps of retrieval, by exact search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.evaluation.search import FloatArray, nearest


def recalls(queries: FloatArray, passages: FloatArray, relevant: Sequence[set[int]], k: int) -> NDArray[np.float64]:
    """Recall@k of each query: the share of its relevant passages among the k nearest, from 0 to 1.

    Args:
        queries: Vectors of length 1, [queries, dimensions].
        passages: Vectors of length 1, [passages, dimensions].
        relevant: For each query the rows of its relevant passages, at least one.
        k: Depth of the search.
    """
    rows, _ = nearest(queries, passages, k)
    found = (len(own.intersection(ranked)) / len(own) for own, ranked in zip(relevant, rows.tolist(), strict=True))
    return np.fromiter(found, dtype=np.float64, count=len(relevant))


def neighbours_kept(
    own: FloatArray, mapped: FloatArray, new: FloatArray, old: FloatArray, rows: Sequence[int], k: int
) -> float:
    """The mean share of a passage's k nearest passages by the new model that its mapped vector finds among the old.

    Args:
        own: Vectors of some passages by the new model, [some, new dimensions].
        mapped: The same, mapped: [some, old dimensions].
        new: Vectors of all passages by the new model.
        old: Vectors of all passages by the old model.
        rows: Which of all passages the given ones are; a passage is not its own neighbour.
        k: Number of neighbours.
    """
    shares = []
    searches = (nearest(own, new, k + 1)[0].tolist(), nearest(mapped, old, k + 1)[0].tolist())
    for row, wanted, found in zip(rows, *searches, strict=True):
        wanted, found = ([other for other in ranked if other != row][:k] for ranked in (wanted, found))
        shares.append(len(set(wanted) & set(found)) / max(1, len(wanted)))
    return float(np.mean(shares))
