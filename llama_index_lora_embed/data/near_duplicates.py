"""Near-duplicates: texts that are equal or nearly so, found without comparing each with each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.config import NEAR_DUPLICATE
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.text import normalise, tokens_of

_SHINGLE = 3
_FEWEST_TOKENS = 8  # with fewer, one changed word changes nearly every shingle of words
_PERMUTATIONS = 128
_RECALL = 0.99  # of pairs at the threshold itself; those above it are found more surely still
_SLACK = 0.1  # four standard errors of an estimate of 0.9 from 128 permutations
_MOST_VERIFIED = 32  # texts of one template are candidates by the thousand; the likeliest are enough
_SHINGLES_KEPT = 1 << 14  # texts; a kilobyte each, as passages go
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)

Shingles = NDArray[np.uint64]


class Sketches:
    """MinHash signatures of texts, each computed once however often the texts are grouped.

    A dataset shares them with its subsets and copies. They are looked up by text, so that no change of a corpus makes
    them stale. Groups are not kept: which texts form a group depends on which others are there.

    Args:
        characters: Compare characters in every text. Queries have too few shingles of words.
    """

    def __init__(self, characters: bool = False) -> None:
        self._characters = characters
        self._signatures: dict[tuple[str, str], bytes] = {}
        self._shingles = lru_cache(maxsize=_SHINGLES_KEPT)(_shingles)

    def shingles(self, key: str, text: str) -> Shingles:
        """The text's shingles; texts with different keys have none in common."""
        return self._shingles(text, self._characters) ^ np.uint64(_hash(key))

    def signatures(self, keyed_texts: Sequence[tuple[str, str]]) -> NDArray[np.uint32]:
        """MinHash signatures [texts, permutations] of (key, text) pairs."""
        for pair in keyed_texts:
            if pair not in self._signatures:
                self._signatures[pair] = _signature(self.shingles(*pair)).tobytes()
        joined = b"".join(self._signatures[pair] for pair in keyed_texts)
        return np.frombuffer(joined, dtype=np.uint32).reshape(-1, _PERMUTATIONS)

    # a dataset compares, copies and pickles this together with its fields, but it is a cache and no part of the data
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sketches)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sketches:
        return self

    def __reduce__(self) -> tuple[type[Sketches], tuple[bool]]:
        return Sketches, (self._characters,)


def near_duplicate_groups(
    texts: Mapping[str, str],
    threshold: float = NEAR_DUPLICATE,
    *,
    within: Mapping[str, str] | None = None,
    sketches: Sketches | None = None,
) -> dict[str, str]:
    """Group texts that are equal or nearly so.

    Equal texts (ignoring case and spaces) always share a group. Every other text joins the first text, in the order
    given, that begins a group and whose similarity to it is at least `threshold`. The similarity is the Jaccard index
    of the sets of three consecutive words, or of three consecutive characters in scripts that write no spaces and in
    texts of fewer than eight words. Candidates come from MinHash with locality-sensitive hashing (Broder 1997;
    Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3) and are then compared exactly: a pair
    below the threshold is never grouped, while a pair just at the threshold is missed about one time in a hundred,
    and more often where many texts come from one template.

    Args:
        texts: Id to text.
        threshold: Jaccard index from which two texts count as the same, above 0 and at most 1.
        within: Id to a key; only texts with the same key are compared. None compares all.
        sketches: Signatures to use and to add to; None starts with none.

    Returns:
        Id to the id of the first text of its group, for all ids (first ones too) of groups of two or more.

    Raises:
        ConfigError: `threshold` is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold={threshold!r}", "a number above 0, at most 1", "0.9 is usual for passages.")
    keys = {i: (within or {}).get(i, "") for i in texts}
    seen: dict[bytes, str] = {}
    first_of = {
        i: seen.setdefault(hashlib.sha256(f"{keys[i]}\0{normalise(text)}".encode("utf-8", "replace")).digest(), i)
        for i, text in texts.items()
    }
    distinct = [i for i, first in first_of.items() if i == first]
    keyed_texts = [(keys[i], texts[i]) for i in distinct]
    pairs = _similar_pairs(keyed_texts, sketches or Sketches(), threshold)
    merged = {distinct[later]: distinct[earlier] for later, earlier in pairs}
    groups = {i: merged.get(first, first) for i, first in first_of.items()}
    shared = {first for i, first in groups.items() if i != first}
    return {i: first for i, first in groups.items() if first in shared}


def _similar_pairs(
    keyed_texts: Sequence[tuple[str, str]], sketches: Sketches, threshold: float
) -> Iterator[tuple[int, int]]:
    """(index of a text, index of the earlier text that it is similar to)."""
    if len(keyed_texts) < 2:
        return
    signatures = sketches.signatures(keyed_texts)
    bands = _shared_bands(signatures, *_bands(threshold))
    index: dict[tuple[int, int], list[int]] = {}
    for number in np.flatnonzero(bands.any(axis=1)).tolist():
        own = sketches.shingles(*keyed_texts[number])
        met = [(band, value) for band, value in enumerate(bands[number].tolist()) if value]
        candidates = sorted({other for at in met for other in index.get(at, ())})
        for other in _likeliest(candidates, signatures, number, threshold):
            theirs = sketches.shingles(*keyed_texts[other])
            common = np.intersect1d(own, theirs, assume_unique=True).size
            if common / (own.size + theirs.size - common) >= threshold:
                yield number, other
                break
        else:
            for at in met:
                index.setdefault(at, []).append(number)


def _signature(shingles: Shingles) -> NDArray[np.uint32]:
    from datasketch import MinHash

    sketch = MinHash(_PERMUTATIONS, hashfunc=int, permutations=_permutations(), scheme="affine32")
    sketch.update_batch((shingles & np.uint64(0xFFFFFFFF)).tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


@lru_cache(maxsize=1)
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=_PERMUTATIONS, scheme="affine32").permutations


def _shared_bands(signatures: NDArray[Any], bands: int, rows: int) -> NDArray[np.int64]:
    """[texts, bands]: a number above 0 that texts with an equal band share, 0 where no other text has it."""
    keys = np.zeros((len(signatures), bands), dtype=np.int64)
    for band in range(bands):
        part = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        _, place, often = np.unique(
            part.view(np.dtype((np.void, part.itemsize * rows))).ravel(), return_inverse=True, return_counts=True
        )
        keys[:, band] = np.where(often[place] > 1, place + 1, 0)
    return keys


def _likeliest(candidates: list[int], signatures: NDArray[Any], number: int, threshold: float) -> Sequence[int]:
    """The candidates worth a comparison, likeliest first, earliest first among equals."""
    if not candidates:
        return []
    estimates = (signatures[candidates] == signatures[number]).mean(axis=1)
    order = np.argsort(-estimates, kind="stable")[:_MOST_VERIFIED]
    return [candidates[i] for i in order if estimates[i] >= threshold - _SLACK]


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the longest rows that still find `_RECALL` of the pairs at the threshold."""
    rows = 1
    while rows < _PERMUTATIONS // 2 and 1 - (1 - threshold ** (rows + 1)) ** (_PERMUTATIONS // (rows + 1)) >= _RECALL:
        rows += 1
    return _PERMUTATIONS // rows, rows


def _shingles(text: str, characters: bool) -> Shingles:
    """Hashes of all runs of three tokens, each once, in ascending order."""
    tokens = tokens_of(text)
    if characters and tokens:
        tokens = list(" ".join(tokens))
    elif len(tokens) < _FEWEST_TOKENS:
        tokens = list(normalise(text)) or [""]  # punctuation counts here: C++ is not C#
    size = min(_SHINGLE, len(tokens))
    hashes = np.fromiter(map(_hash, tokens), dtype=np.uint64, count=len(tokens))
    windows = np.lib.stride_tricks.sliding_window_view(hashes, size)
    # sums wrap around at 64 bits, as a hash should; equal sums of unequal shingles occur once in 2^64
    return np.unique((windows * _MULTIPLIERS[:size]).sum(axis=1, dtype=np.uint64))


@lru_cache(maxsize=1 << 18)
def _hash(token: str) -> int:
    # not hash(), which differs from one process to the next; lone surrogates cannot be encoded
    return int.from_bytes(hashlib.blake2b(token.encode("utf-8", "replace"), digest_size=8).digest(), "little")
