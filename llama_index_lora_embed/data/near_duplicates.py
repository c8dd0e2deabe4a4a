"""Near-duplicates: texts that are equal or nearly so, found without comparing each with each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.config import NEAR_DUPLICATE
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.core.scratch import scratch_array
from llama_index_lora_embed.data.text import normalise, tokens_of

_SHINGLE = 3
_FEWEST_TOKENS = 8  # with fewer, one changed word changes nearly every shingle of words
_PERMUTATIONS = 128
_RECALL = 0.99  # of pairs at the threshold itself; those above it are found more surely still
_SLACK = 0.1  # four standard errors of an estimate of 0.9 from 128 permutations
_MOST_VERIFIED = 32  # texts of one template are candidates by the thousand; the likeliest are enough
_SHINGLES_KEPT = 1 << 14  # texts; a kilobyte each, as passages go
_BLOCK = 1 << 12  # texts whose bands are hashed at once
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)

Shingles = NDArray[np.uint64]
KeyedText = tuple[str, str]  # a key and a text; only texts with the same key are compared


class Sketches:
    """MinHash signatures of texts, each computed once however often the texts are grouped.

    A dataset shares them with its subsets and copies. They are looked up by text, so that no change of a corpus makes
    them stale. Groups are not kept: which texts form a group depends on which others are there.

    Args:
        characters: Compare characters in every text. Queries have too few shingles of words.
        keep: Keep the signatures, 700 bytes and the text for each.
    """

    def __init__(self, characters: bool = False, keep: bool = True) -> None:
        self._characters = characters
        self._keep = keep
        self._signatures: dict[KeyedText, bytes] = {}
        self._shingles = lru_cache(maxsize=_SHINGLES_KEPT)(_shingles)

    def shingles(self, key: str, text: str) -> Shingles:
        """The text's shingles; texts with different keys have none in common."""
        return self._shingles(text, self._characters) ^ np.uint64(_hash(key))

    def signature(self, key: str, text: str) -> NDArray[np.uint32]:
        """MinHash signature [permutations] of a text with its key."""
        if (known := self._signatures.get((key, text))) is not None:
            return np.frombuffer(known, dtype=np.uint32)
        made = _signature(self.shingles(key, text))
        if self._keep:
            self._signatures[key, text] = made.tobytes()
        return made

    # a dataset compares, copies and pickles this together with its fields, but it is a cache and no part of the data
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sketches)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sketches:
        return self

    def __reduce__(self) -> tuple[type[Sketches], tuple[bool, bool]]:
        return Sketches, (self._characters, self._keep)


def near_duplicate_groups(
    texts: Mapping[str, str],
    threshold: float = NEAR_DUPLICATE,
    *,
    within: Mapping[str, str] | None = None,
    sketches: Sketches | None = None,
    folder: str | os.PathLike[str] | None = None,
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
        texts: Id to text. Texts are looked up when they are needed, so that a mapping may read them from a disk.
        threshold: Jaccard index from which two texts count as the same, above 0 and at most 1.
        within: Id to a key; only texts with the same key are compared. None compares all.
        sketches: Signatures to use and to add to; None keeps none.
        folder: Where to keep signatures and bands, about 700 bytes for each text, in temporary files without a name;
            None keeps them in memory.

    Returns:
        Id to the id of the first text of its group, for all ids (first ones too) of groups of two or more.

    Raises:
        ConfigError: `threshold` is not above 0 and at most 1.
        OutputDirectoryError: `folder` cannot be written, or has no room.
    """
    ids, keys = list(texts), within or {}
    firsts = first_alike(
        len(ids), lambda number: (keys.get(ids[number], ""), texts[ids[number]]), threshold, sketches, folder
    )
    later = np.flatnonzero(firsts != np.arange(len(ids)))
    return {ids[number]: ids[firsts[number]] for number in np.union1d(later, firsts[later]).tolist()}


def first_alike(
    count: int,
    text_of: Callable[[int], KeyedText],
    threshold: float = NEAR_DUPLICATE,
    sketches: Sketches | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> NDArray[np.int64]:
    """`near_duplicate_groups` by number: the first text of each one's group, which may be itself [texts].

    With a folder, the memory is about 60 bytes for each text, and more where most of them share a band.

    Args:
        count: Number of texts.
        text_of: The key and the text of a number.
        threshold: As there, and so are the others, and the errors.
        sketches: See there.
        folder: See there.
    """
    check_threshold(threshold)
    firsts = _first_equal(map(text_of, range(count)), count)
    distinct = np.flatnonzero(firsts == np.arange(count))
    for later, earlier in _similar_pairs(distinct, text_of, sketches or Sketches(keep=False), threshold, folder):
        firsts[later] = earlier
    return firsts[firsts]


def check_threshold(threshold: float) -> None:
    """Raise a `ConfigError` unless this is above 0 and at most 1."""
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold={threshold!r}", "a number above 0, at most 1", "0.9 is usual for passages.")


def _first_equal(keyed_texts: Iterable[KeyedText], count: int) -> NDArray[np.int64]:
    """For each text the number of the first that is equal to it, ignoring case and spaces [texts]."""
    digests = (
        hashlib.sha256(f"{key}\0{normalise(text)}".encode("utf-8", "replace")).digest()[:16]
        for key, text in keyed_texts
    )
    halves = np.fromiter(digests, dtype="V16", count=count).view(np.uint64).reshape(-1, 2)
    firsts = np.arange(count)
    places, heads = _repeated(halves[:, 0], halves[:, 1])
    firsts[places] = np.repeat(places[heads], np.diff(heads, append=len(places)))
    return firsts


def _repeated(*columns: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of values (in one column, or spread over several) that occur more than once.

    Returns:
        The places, equal values side by side and in ascending order, and where among them each value begins.
    """
    order = np.lexsort(columns)
    as_before = np.zeros(len(order) + 1, dtype=bool)
    as_before[1:-1] = True
    for column in columns:
        ordered = column[order]
        as_before[1:-1] &= ordered[1:] == ordered[:-1]
    repeated = as_before[:-1] | as_before[1:]
    return order[repeated], np.flatnonzero(~as_before[:-1][repeated])


def _similar_pairs(
    numbers: NDArray[np.int64],
    text_of: Callable[[int], KeyedText],
    sketches: Sketches,
    threshold: float,
    folder: str | os.PathLike[str] | None,
) -> Iterator[tuple[int, int]]:
    """(number of a text, number of the earlier text that it is similar to)."""
    if len(numbers) < 2:
        return
    count, rows = _bands(threshold)
    signatures = scratch_array((len(numbers), _PERMUTATIONS), np.uint32, folder)
    bands = scratch_array((count, len(numbers)), np.int64, folder)
    _fill(signatures, bands, rows, (sketches.signature(*text_of(int(number))) for number in numbers))
    lists = scratch_array((_list_places(bands),), np.int64, folder)

    def shingles_of(row: int) -> Shingles:
        return sketches.shingles(*text_of(int(numbers[row])))

    for row in map(int, np.flatnonzero(bands.any(axis=0))):
        begins = bands[:, row]
        begins = begins[begins > 0]
        lengths = lists[begins]
        met = [lists[at + 1 : at + 1 + n] for at, n in zip(begins.tolist(), lengths.tolist(), strict=True) if n]
        found = np.sort(np.concatenate([lists[:0], *met]))
        candidates = found[np.diff(found, prepend=-1) > 0]  # np.unique hashes, which takes longer
        likely = _likeliest(candidates, signatures, row, threshold)
        own = shingles_of(row) if likely else np.empty(0, np.uint64)
        for other in likely:
            theirs = shingles_of(other)
            common = np.intersect1d(own, theirs, assume_unique=True).size
            if common / (own.size + theirs.size - common) >= threshold:
                yield int(numbers[row]), int(numbers[other])
                break
        else:
            lists[begins + 1 + lengths] = row
            lists[begins] = lengths + 1


def _fill(
    signatures: NDArray[np.uint32], bands: NDArray[np.int64], rows: int, made: Iterator[NDArray[np.uint32]]
) -> None:
    """Write signatures [texts, permutations], and a hash of each of their bands [bands, texts]."""
    multipliers = np.cumprod(np.full(rows, _MULTIPLIERS[0]))  # sums wrap around at 64 bits, as in shingles
    for start in range(0, len(signatures), _BLOCK):
        block = signatures[start : start + _BLOCK]
        for row, signature in zip(block, made, strict=False):
            row[:] = signature
        cells = block[:, : len(bands) * rows].reshape(-1, len(bands), rows) * multipliers
        bands[:, start : start + _BLOCK] = cells.sum(axis=2, dtype=np.uint64).view(np.int64).T


def _list_places(bands: NDArray[np.int64]) -> int:
    """Replace the hashes of bands [bands, texts] by the place of a list, the same for the same band.

    All lists are in one array, each after a cell for its length. The place is 0 where no other text has the band.

    Returns:
        The length of that array.
    """
    length = 1
    for band in bands:
        places, heads = _repeated(band)
        band[:] = 0
        band[places] = np.repeat(length + heads + np.arange(len(heads)), np.diff(heads, append=len(places)))
        length += len(places) + len(heads)
    return length


def _signature(shingles: Shingles) -> NDArray[np.uint32]:
    from datasketch import MinHash

    sketch = MinHash(_PERMUTATIONS, hashfunc=int, permutations=_permutations(), scheme="affine32")
    sketch.update_batch((shingles & np.uint64(0xFFFFFFFF)).tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


@lru_cache(maxsize=1)
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=_PERMUTATIONS, scheme="affine32").permutations


def _likeliest(
    candidates: NDArray[np.int64], signatures: NDArray[np.uint32], row: int, threshold: float
) -> Sequence[int]:
    """The candidates worth a comparison, likeliest first, earliest first among equals."""
    if not len(candidates):
        return []
    estimates = (signatures[candidates] == signatures[row]).mean(axis=1)
    order = np.argsort(-estimates, kind="stable")[:_MOST_VERIFIED]
    likely: list[int] = candidates[order[estimates[order] >= threshold - _SLACK]].tolist()
    return likely


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
