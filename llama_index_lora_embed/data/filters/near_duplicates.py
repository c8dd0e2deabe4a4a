"""Texts that say the same in almost the same words, found without comparing each with each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.config import NEAR_DUPLICATE
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import normalise

# scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han with its extensions
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_SHINGLE = 3
_FEWEST_TOKENS = 8  # with fewer, one changed word changes nearly every shingle of words
_PERMUTATIONS = 128
_RECALL = 0.99  # of pairs at the threshold itself; those above it are found more surely still
_SLACK = 0.1  # four standard errors of an estimate of 0.9 from 128 permutations
_MOST_VERIFIED = 32  # texts of one template are candidates by the thousand; the likeliest are enough
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)

Shingles = NDArray[np.uint64]


def near_duplicate_groups(
    texts: Mapping[str, str],
    threshold: float = NEAR_DUPLICATE,
    *,
    within: Mapping[str, str] | None = None,
    characters: bool = False,
) -> dict[str, str]:
    """Group texts that are equal or nearly so.

    Equal texts (but for case and spaces) always share a group. Others join the first text, in the order given,
    that begins a group and is at least `threshold` like them, so that everything in a group is that close to its
    first text. Likeness is the Jaccard similarity of the sets of three words in a row, or of three characters in
    scripts that write no spaces and in texts of fewer than eight words. Candidates come from MinHash with
    locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter
    3) and are then compared in truth: a pair below the threshold is never grouped, while a pair that is just at the
    threshold is missed about one time in a hundred, and more often where many texts come from one template.

    Args:
        texts: Id to text.
        threshold: Jaccard similarity from which two texts are the same, above 0 and at most 1.
        within: Id to a key; only texts with the same key are compared. None compares all.
        characters: Compare characters in every text. For questions, whose shingles of words are too few.

    Returns:
        Id to the id of the first text of its group, for the ids (first ones too) of groups of two or more.

    Raises:
        ConfigError: `threshold` is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold={threshold!r}", "a number above 0, at most 1", "0.9 is usual for passages.")
    keys = {i: (within or {}).get(i, "") for i in texts}
    first_of = _equal_texts(texts, keys)
    distinct = [i for i, first in first_of.items() if i == first]

    def shingles(number: int) -> Shingles:
        name = distinct[number]
        return _shingles(texts[name], characters) ^ np.uint64(_hash(keys[name]))  # other keys share no shingle

    merged = {distinct[later]: distinct[earlier] for later, earlier in _alike(len(distinct), shingles, threshold)}
    groups = {i: merged.get(first, first) for i, first in first_of.items()}
    shared = {first for i, first in groups.items() if i != first}
    return {i: first for i, first in groups.items() if first in shared}


def tokens_of(text: str) -> list[str]:
    """Lower-case words; each character by itself in scripts that write no spaces."""
    return _TOKEN.findall(text.lower())


def is_unspaced(token: str) -> bool:
    """Whether a token of `tokens_of` is a character of a script that writes no spaces."""
    return len(token) == 1 and re.match(f"[{_UNSPACED}]", token) is not None


def _equal_texts(texts: Mapping[str, str], keys: Mapping[str, str]) -> dict[str, str]:
    """Id to the id of the first equal text."""
    seen: dict[bytes, str] = {}
    return {
        i: seen.setdefault(hashlib.sha256(f"{keys[i]}\0{normalise(text)}".encode("utf-8", "replace")).digest(), i)
        for i, text in texts.items()
    }


def _alike(count: int, shingles: Callable[[int], Shingles], threshold: float) -> Iterator[tuple[int, int]]:
    """(number of a text, number of the earlier text that it is like); shingles are made anew, not kept."""
    if count < 2:
        return
    from datasketch import MinHash

    permutations = MinHash(num_perm=_PERMUTATIONS, scheme="affine32").permutations
    signatures = np.zeros((count, _PERMUTATIONS), dtype=np.uint32)
    for number in range(count):
        sketch = MinHash(_PERMUTATIONS, hashfunc=_itself, permutations=permutations, scheme="affine32")
        sketch.update_batch((shingles(number) & np.uint64(0xFFFFFFFF)).tolist())
        signatures[number] = sketch.hashvalues
    keys = _shared_bands(signatures, *_bands(threshold))
    index: dict[tuple[int, int], list[int]] = {}
    for number in np.flatnonzero(keys.any(axis=1)).tolist():
        own, met = shingles(number), [(band, key) for band, key in enumerate(keys[number].tolist()) if key]
        candidates = sorted({other for at in met for other in index.get(at, ())})
        for other in _likeliest(candidates, signatures, number, threshold):
            if _jaccard(own, shingles(other)) >= threshold:
                yield number, other
                break
        else:
            for at in met:
                index.setdefault(at, []).append(number)


def _shared_bands(signatures: NDArray[Any], bands: int, rows: int) -> NDArray[np.int64]:
    """[texts, bands]: a number above 0 that texts share which are equal in this band, 0 where no other text is.

    That is all that locality-sensitive hashing finds, in four bytes a permutation instead of an index of every text.
    """
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
    """Hashes of all three tokens in a row, each once, in ascending order."""
    tokens = tokens_of(text)
    if characters:
        tokens = list(" ".join(tokens))
    elif len(tokens) < _FEWEST_TOKENS:
        tokens = list(normalise(text))  # punctuation counts here: C++ is not C#
    if not tokens:
        tokens = list(normalise(text)) or [""]
    size = min(_SHINGLE, len(tokens))
    hashes = np.fromiter(map(_hash, tokens), dtype=np.uint64, count=len(tokens))
    windows = np.lib.stride_tricks.sliding_window_view(hashes, size)
    # sums wrap around at 64 bits, which is what a hash wants; equal sums of unequal shingles are one in 2^64
    return np.unique((windows * _MULTIPLIERS[:size]).sum(axis=1, dtype=np.uint64))


def _jaccard(left: Shingles, right: Shingles) -> float:
    common = np.intersect1d(left, right, assume_unique=True).size
    return float(common / (left.size + right.size - common))


@lru_cache(maxsize=1 << 18)
def _hash(token: str) -> int:
    # not hash(), which differs from one process to the next; lone surrogates cannot be encoded
    return int.from_bytes(hashlib.blake2b(token.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _itself(value: int) -> int:
    return value
