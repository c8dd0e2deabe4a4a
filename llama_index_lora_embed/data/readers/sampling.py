"""A sample of a stream in bounded memory, the same whatever the order of the stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class HashSample(Generic[_Item]):
    """The items whose keys have the smallest hashes, of `count` different keys.

    A key that is in the sample at the end was in it since its first item, so that no item of it is missing.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: dict[int, dict[_Item, str]] = {}
        self._largest: list[int] = []  # a heap of negated hashes

    def add(self, key: str, item: _Item, where: str = "") -> bool:
        """Offer an item of a key; returns whether it was in the sample already."""
        place = int(digest(key), 16)
        if place not in self._kept:
            self._kept[place] = {}
            heappush(self._largest, -place)
            if len(self._largest) > self._count:
                del self._kept[-heappop(self._largest)]
        of_key = self._kept.get(place, {})
        known = item in of_key
        of_key.setdefault(item, where)
        return known

    def __iter__(self) -> Iterator[tuple[str, _Item]]:
        """(where it was first, item), in an order that does not depend on that of the stream."""
        for _, of_key in sorted(self._kept.items()):
            yield from sorted(((where, item) for item, where in of_key.items()), key=lambda entry: repr(entry[1]))


def digest(text: str) -> str:
    """Sixteen hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
