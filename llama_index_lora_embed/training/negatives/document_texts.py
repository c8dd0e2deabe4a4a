"""The texts of a document, searched all at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


class DocumentTexts:
    """Answers which of many texts contain or overlap a given one, in time linear in the length of both.

    Args:
        texts: Normalised, so that none contains a line break.
        overlap: Length of a text's end that makes two texts overlap where the other one contains it.
    """

    def __init__(self, texts: Sequence[str], overlap: int) -> None:
        self._overlap = overlap
        self._joined = "\n".join(texts)
        self._starts = [0, *accumulate(len(text) + 1 for text in texts)]
        self._ends: dict[int, dict[str, list[int]]] = {}
        for number, text in enumerate(texts):
            end = text[-overlap:]
            self._ends.setdefault(len(end), {}).setdefault(end, []).append(number)
        self._known: dict[str, set[int]] = {}

    def containing(self, piece: str) -> set[int]:
        """Numbers of the texts that contain the piece, which is not empty."""
        found = set()
        at = self._joined.find(piece)
        while at >= 0:
            number = bisect_right(self._starts, at) - 1
            found.add(number)
            at = self._joined.find(piece, self._starts[number + 1])
        return found

    def overlapping(self, text: str) -> set[int]:
        """Numbers of the texts that contain the end of the given one, which is not empty, or end within it."""
        if text not in self._known:
            found = self.containing(text[-self._overlap :])
            for length, ends in self._ends.items():
                for at in range(len(text) - length + 1):
                    found.update(ends.get(text[at : at + length], ()))
            self._known[text] = found
        return self._known[text]
