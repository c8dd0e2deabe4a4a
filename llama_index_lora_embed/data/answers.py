"""From what an LLM wrote to the questions in it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llama_index_lora_embed.data.dataset import normalise

_MAX_CHARACTERS = 300
"""Longer lines are prose. The longest of 3,000 questions of people in MedQuAD has 190 characters."""
_STYLE = r"question|keywords?(?: search)?|paraphrase|conversational"
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_MARK = re.compile(
    r"^(?:[-*•–—>#·‣▪]+\s+"  # bullets and Markdown
    r"|[(\[]?\d{1,3}[.):\]]+(?:\s+|(?=\D))"  # 1.  1)  (1)
    r"|\(?[a-h][.)]\s+"  # a)
    r"|\d{1,3}\s*[、．]\s*"
    r"|(?:q|question|query|frage|pregunta|问题|問題|質問)\s*#?\s*\d{1,3}\s*[:.)：-]\s*"  # Question 1:
    r"|(?:q|query|search query)\s*[:：]\s*)",
    re.IGNORECASE,
)
_TAG = re.compile(rf"^[\[(*]*(?P<style>{_STYLE})[\])*]*\s*[:：–-]\s*[*]*\s*", re.IGNORECASE)
_QUOTES = "\"'`*_“”„«»‘’「」『』"
_PREAMBLE = re.compile(
    r"^(?:here (?:are|is)|sure|certainly|of course|okay|ok|below|the following|these are|based on the|hier sind"
    r"|natürlich|voici|bien sûr|aquí|claro|ecco|certo|以下|当然|好的)\b.*[:：.!。]$|^(?:以下|当然|好的).*[:：。]$",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"^(?:i(?:'|’)?m sorry|i am sorry|sorry|i apologi[sz]e|unfortunately|as an ai|i (?:can(?:'|’)?t|cannot|can not|am"
    r" unable|won(?:'|’)?t)\b.{0,40}"
    r"\b(?:generate|create|provide|help|assist|answer|fulfil|comply|write|do|make|see|access)"
    r"|there (?:is|are) (?:no|not) (?:enough |sufficient )?(?:information|context)"
    r"|no (?:questions?|quer(?:y|ies)) (?:can|could)|es tut mir leid|leider|désolée?|je (?:suis désolé|ne peux pas)"
    r"|lo siento|no puedo|mi dispiace|抱歉|对不起|很抱歉|申し訳)",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"^(?:let me know|i hope|hope this|feel free|these (?:questions|queries)|note(?: that)?\b|answer\s*[:：]"
    r"|passage\s*[:：]|explanation\s*[:：]|would you like)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ParsedQuestion:
    """A question as it stood in an answer.

    Attributes:
        text: Without numbering, bullets, quotes and tags.
        style: The style that the answer tagged it with, or None.
    """

    text: str
    style: str | None = None


def parse_questions(answer: Any, limit: int | None = None) -> list[ParsedQuestion]:
    """The questions in an answer, one a line or as JSON; preambles, refusals and remarks are dropped.

    Args:
        answer: Text of the answer; anything else holds no question.
        limit: Questions at most; None for all.

    Returns:
        Questions in their order, each wording once; empty where there is none.
    """
    if not isinstance(answer, str):
        return []
    found: dict[str, ParsedQuestion] = {}
    for line, style in _lines(_FENCE.sub("", _THOUGHT.sub("", answer)).strip()):
        question = _clean(line, style)
        if question is not None:
            found.setdefault(normalise(question.text), question)
    return list(found.values())[:limit]


def _lines(text: str) -> Iterator[tuple[str, str | None]]:
    """(line, style) from JSON where the text is JSON, else from its lines."""
    if text[:1] in "[{" and text:
        try:
            yield from _json_lines(json.loads(text))
            return
        except ValueError:
            pass
    for line in text.splitlines():
        yield line, None


def _json_lines(value: Any) -> Iterator[tuple[str, str | None]]:
    if isinstance(value, str):
        yield value, None
    elif isinstance(value, list):
        for item in value:
            yield from _json_lines(item)
    elif isinstance(value, dict):
        text = value.get("query") or value.get("question")
        if isinstance(text, str):
            style = value.get("style")
            yield text, style if isinstance(style, str) else None
        else:
            for item in value.values():
                yield from _json_lines(item)


def _clean(line: str, style: str | None) -> ParsedQuestion | None:
    """The question in a line, or None where it holds none."""
    line = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in line)
    line = " ".join(line.split())
    for _ in range(3):  # "1. **Question:** ..." wears several layers
        bare = line.strip(_QUOTES + " ")
        bare = _MARK.sub("", bare, count=1)
        if tag := _TAG.match(bare):
            style, bare = tag["style"], bare[tag.end() :]
        if bare == line:
            break
        line = bare
    letters = sum(c.isalpha() for c in line)
    # under half letters and spaces is no language: tables, markup, noise
    if letters < 2 or 2 * sum(c.isalnum() or c.isspace() for c in line) < len(line) or len(line) > _MAX_CHARACTERS:
        return None
    if line.endswith((":", "：")) or line[0] in "<{[":
        return None
    if any(pattern.match(line) for pattern in (_PREAMBLE, _REFUSAL, _CLOSING)):
        return None
    return ParsedQuestion(line, _style(style))


def _style(style: str | None) -> str | None:
    """The style's plain name; unknown ones become None."""
    known = ("question", "keyword", "paraphrase", "conversational")
    name = next((name for name in known if style and style.lower().startswith(name)), None)
    return "keywords" if name == "keyword" else name
