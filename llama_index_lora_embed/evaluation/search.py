"""Exact search in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# block size: 16 MB of scores, whatever the size of the corpus
_QUERIES = 256
_PASSAGES = 16_384

FloatArray = NDArray[np.float32]


def nearest(queries: FloatArray, passages: FloatArray, depth: int) -> tuple[NDArray[np.int64], FloatArray]:
    """The passages with the highest dot product for each query, best first; ties in the order of their rows.

    Args:
        queries: [queries, dimensions], at least one.
        passages: [passages, dimensions]; they may be memory-mapped, and are read block by block.
        depth: Number of passages for each query.

    Returns:
        Rows of `passages` and their scores, each [queries, min(depth, passages)].

    Raises:
        ConfigError: The vectors of queries and passages differ in length.
    """
    import torch

    if queries.shape[1] != passages.shape[1]:
        raise ConfigError(
            f"query vectors of {queries.shape[1]} and passage vectors of {passages.shape[1]} dimensions",
            "the same number of dimensions for both",
            "Embed queries and passages with one model.",
        )
    found = []
    for part in torch.split(torch.from_numpy(queries), _QUERIES):
        scores, rows = torch.empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64)
        for start in range(0, len(passages), _PASSAGES):
            block = passages[start : start + _PASSAGES]
            block = block if block.flags.writeable else np.array(block)  # torch warns of arrays that it cannot write
            with torch.autocast("cpu", enabled=False):  # scores are float32 whatever the precision of training
                similarities = part @ torch.from_numpy(block).T
            values, columns = _highest(similarities, depth)
            # earlier rows come first, and a stable sort keeps them there
            scores, rows = torch.cat([scores, values], dim=1), torch.cat([rows, columns + start], dim=1)
            scores, order = (t[:, :depth] for t in scores.sort(dim=1, descending=True, stable=True))
            rows = rows.gather(1, order)
        found.append((rows, scores))
    rows, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows.numpy(), scores.numpy()


def _highest(scores: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their columns; of tied scores, those in the lowest columns, in their order."""
    import torch

    depth = min(depth, scores.shape[1])
    more = min(depth + 1, scores.shape[1])
    values, columns = scores.topk(more, dim=1)
    # torch.topk picks any of several equal scores: rows in which the last one picked is tied are sorted in full
    tied = values[:, depth - 1] == values[:, -1] if more > depth else torch.zeros(len(values), dtype=torch.bool)
    ambiguous = tied.nonzero().flatten()
    columns, order = columns[:, :depth].sort(dim=1)
    values = values[:, :depth].gather(1, order)
    if len(ambiguous):
        exact = scores[ambiguous].sort(dim=1, descending=True, stable=True)
        values[ambiguous], columns[ambiguous] = exact.values[:, :depth], exact.indices[:, :depth]
    return values, columns
