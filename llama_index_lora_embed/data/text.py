"""Texts for comparison: normalised, and in words."""

from __future__ import annotations

import re

# scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han with its extensions
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def normalise(text: str) -> str:
    """The text in lower case with single spaces."""
    return " ".join(text.lower().split())


def tokens_of(text: str) -> list[str]:
    """Lower-case words; in scripts that write no spaces, single characters."""
    return _TOKEN.findall(text.lower())


def is_unspaced(token: str) -> bool:
    """Whether a token of `tokens_of` is a character of a script that writes no spaces."""
    return len(token) == 1 and re.match(f"[{_UNSPACED}]", token) is not None
