"""Choice of `max_seq_length` by the lengths of the training texts, and how many it truncates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.tokens import count_tokens, longest_input
from llama_index_lora_embed.models.windows import longest_text, takes_windows, window_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_KEPT = 512  # a base's own limit is not lowered below this; above it the data decide
_SAMPLED = 2000  # passages that decide on windows
MOSTLY_CUT = 1 / 3
"""Share of truncated passages above which windows are taken: 47 % of tenk_train's are longer than MiniLM's 512 tokens,
and windows gained on its folds; 11 % of medquad_train's are (benchmarks/README.md, "Experiments on quality")."""


@dataclass(frozen=True)
class Truncation:
    """How many of the training texts are longer than the base's own limit and than this run's, in tokens.

    `window` is the one that would read longer texts completely; None where none would, or nothing is truncated.
    `read_in` is the one that texts are read in; None without windows.
    """

    texts: int
    length_before: int
    cut_before: int
    length_after: int
    cut_after: int
    longest: int
    window: int | None = None
    read_in: int | None = None

    def __str__(self) -> str:
        length = f"max_seq_length={self.length_after}"
        if self.read_in is not None:
            length += f" in windows of {self.read_in} tokens"
        return (
            f"{self.cut_before} of {self.texts} texts are longer than the model's own limit of {self.length_before} "
            f"tokens; with {length}, {self.cut_after} are truncated (the longest has {self.longest} tokens)."
        ) + ("" if self.window is None else f" window={self.window} reads them whole, if the base is a plain encoder.")


def choose_length(
    model: SentenceTransformer,
    queries: Iterable[str],
    passages: Iterable[str],
    coverage: float,
    wanted: int | None,
) -> Truncation:
    """Set `model.max_seq_length` to the shortest length that covers the texts, and count the truncated ones.

    The coverage holds for passages and for queries separately: many short queries would otherwise hide that every
    passage is truncated. The length is a multiple of 8, which is fast on most processors, up to what the model's
    positions allow. It is at least the base's own limit (or 512, if that is less): longer nodes than the training texts
    may be indexed later, and a batch is only padded to its own longest text.

    `coverage` is the share of texts that are not truncated; with windows it is 1. `wanted` overrides the search.

    Raises:
        ConfigError: `wanted` is more than the model's positions allow.
    """
    limit, windows = longest_text(model), window_of(model) is not None
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"max_seq_length={wanted}",
            f"at most {limit}, which is all that {'windows hold' if windows else 'the base has positions for'}",
            "Choose a shorter length, split the nodes into shorter chunks, or take another base.",
        )  # fmt: skip
    query_lengths = count_tokens(model, queries, model.prompts.get("query") or "")
    passage_lengths = count_tokens(model, passages, model.prompts.get("document") or "")
    lengths = query_lengths + passage_lengths
    own = model.max_seq_length or limit
    if wanted is None:
        share = 1.0 if windows else coverage  # a longer limit makes no window longer
        needed = max(_quantile(query_lengths, share), _quantile(passage_lengths, share))
        wanted = min(limit, max(8 * math.ceil(needed / 8), min(own, _KEPT)))
    model.max_seq_length = wanted
    cut_after = sum(length > wanted for length in lengths)
    return Truncation(
        texts=len(lengths),
        length_before=own,
        cut_before=sum(length > own for length in lengths),
        length_after=wanted,
        cut_after=cut_after,
        longest=max(lengths, default=0),
        window=limit if cut_after and wanted == limit and not windows else None,
        read_in=window_of(model),
    )


def choose_window(model: SentenceTransformer, passages: Collection[str]) -> int | None:
    """Tokens of the windows that `window="auto"` stands for; None for no windows.

    They are taken where more than `MOSTLY_CUT` of the passages are longer than the model's positions allow, and are as
    long as these: shorter ones change the vectors of shorter passages too. Of many passages evenly spaced ones decide,
    so that the same corpus always has the same windows. None for a model that cannot have windows, or has its own.
    """
    if not passages or not takes_windows(model):
        return None
    limit = longest_input(model)
    sample = islice(passages, 0, None, math.ceil(len(passages) / _SAMPLED))
    lengths = count_tokens(model, sample, model.prompts.get("document") or "")
    return limit if sum(length > limit for length in lengths) > MOSTLY_CUT * len(lengths) else None


def _quantile(lengths: list[int], coverage: float) -> int:
    """The smallest length that at least `coverage` of the texts do not exceed."""
    if not lengths:
        return 1
    return sorted(lengths)[max(0, math.ceil(coverage * len(lengths)) - 1)]
