"""Queries out of the text of an LLM's answer."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from llama_index_lora_embed.data.text import normalise

_MAX_CHARACTERS = 300
"""Longer lines are prose. The longest of 3,000 human-written questions in MedQuAD has 190 characters."""
_STYLES = {
    "question": r"question|frage|pregunta|domanda|pergunta|вопрос|问题|問題|質問|질문",
    "keywords": r"keywords?(?: search)?|stichwörter|schlüsselwörter|suchwörter|mots[- ]clés|palabras clave|关键词",
    "paraphrase": r"paraphrased?|umschreibung|paráfrasis|改写|改寫",
    "conversational": r"conversational|umgangssprachlich|conversationnelle?|conversacional|对话|口语",
    "claim": r"claim|behauptung|affirmation|afirmación|论断",
    "title": r"title|titel|titre|título|标题",
}
_ON_REQUEST = {"claim", "title"}
"""Styles that are recognised only where they were asked for: "Title: ..." also stands above a list of queries."""
_STYLE = "|".join(f"(?P<{name}>{words})" for name, words in _STYLES.items())
_REASONING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_MARK = re.compile(
    r"(?:[-*•–—·‣▪]+\s+"  # bullets
    r"|[*_]*[(\[]?\d{1,3}[.):\]]+(?:[*_]*\s+|(?=\D))"  # 1.  1)  (1)  **1.**
    r"|\(?[a-h][.)]\s+"  # a)
    r"|\d{1,3}\s*[、．]\s*"
    r"|[*_]*(?:q|question|query|frage|pregunta|问题|問題|質問)\s*#?\s*\d{1,3}[*_]*\s*[:.)：-][*_]*\s*"  # Question 1:
    r"|[*_]*(?:q|query|search query)[*_]*\s*[:：][*_]*\s*)",
    re.IGNORECASE,
)
# "question: ...", or "[question] ..." where the bracket closes it
_IN_BRACKETS = _STYLE.replace("?P<", "?P<in_")
_TAG = re.compile(
    rf"(?:[*_]*(?:{_STYLE})[*_]*\s*[:：–]\s*[*_]*|[\[(<](?:{_IN_BRACKETS})[\])>]\s*[:：-]?)\s*", re.IGNORECASE
)
_CLOSING_TAG = re.compile(r"\s*</\w+>$")
_RUN = re.compile(r"([*_`\"'])\1*")  # of emphasis or quotes that open and close alike
_PAIRS = ("“”", "„“", "„”", "«»", "»«", "‘’", "「」", "『』")
_NO_QUERY = re.compile(
    # preambles
    r"(?:(?:here (?:are|is)|sure|certainly|of course|okay|ok|below|the following|these are|based on the|hier sind"
    r"|natürlich|voici|bien sûr|aquí|claro|ecco|certo)\b.*[:.!]$"
    r"|here (?:are|is) (?:the |some |\w+ )?(?:\w+ )?(?:search )?(?:queries|questions)\b|(?:以下|当然|好的).*[:：。]$"
    # refusals
    r"|(?:i(?:'|’)?m|i am) (?:so )?sorry|sorry\b|i apologi[sz]e|unfortunately\b|as an ai\b"
    r"|(?:i (?:can(?:'|’)?t|cannot|can not|won(?:'|’)?t)|(?:(?:i(?:'|’)?m|i am) )?(?:unable|not able) to)\b.{0,40}"
    r"\b(?:generate|create|provide|help|assist|answer|fulfil|comply|write|do|make|see|access|produce)"
    r"|there (?:is|are) (?:no|not) (?:enough |sufficient )?(?:information|context)|please provide\b"
    r"|the (?:provided |given )?(?:text|passage|context) (?:does not|doesn(?:'|’)?t|is (?:empty|too short|not))\b"
    r"|no (?:suitable |relevant )?(?:questions?|quer(?:y|ies))(?:\W*$| (?:can|could|were|found)\b)"
    r"|(?:n/a|none|null|nil|undefined)\W*$"
    r"|es tut mir leid|leider\b|désolée?\b|je (?:suis désolé|ne peux pas)|lo siento|no puedo\b|mi dispiace|non posso\b"
    r"|desculpe|не могу|извините|抱歉|对不起|很抱歉|申し訳|无法|無法|我(?:不能|无法)"
    # errors, answers, remarks
    r"|(?:error|rate limit|too many requests|internal server error|bad gateway|service unavailable)\b.{0,60}"
    r"(?:\d{3}|exceeded|reached|limit|error)|let me know\b|i hope\b|hope this\b|feel free\b|would you like\b"
    r"|(?:these|the above) (?:questions|queries)\b|\(?note(?: that)?\b\s*[:,]?"
    r"|(?:a|answer|antwort|réponse|respuesta|答)\s*[:：]|(?:passage|explanation)\s*[:：])",
    re.IGNORECASE,
)
_TEXT_KEYS = ("query", "question", "text", "search_query")
_JSON_STRING = r'"(?P<text>(?:[^"\\]|\\.)*)"'
_TRUNCATED_VALUE = re.compile(rf'"(?:{"|".join((*_TEXT_KEYS, *_STYLES))})"\s*:\s*{_JSON_STRING}')
_TRUNCATED_ITEM = re.compile(rf"[\[,]\s*{_JSON_STRING}")


@dataclass(frozen=True)
class ParsedQuery:
    """A line of an answer without numbering, bullets, quotes and tags."""

    text: str
    style: str | None = None
    """The style that the answer names."""
    marked: bool = False
    """Whether it was numbered, tagged, or in JSON."""


def parse_queries(answer: Any, limit: int | None = None, styles: Collection[str] = ()) -> list[ParsedQuery]:
    """The queries in an answer, one per line or as JSON; preambles, refusals and remarks are dropped.

    If some lines are numbered, bulleted or tagged with a style, only those count; claims and titles only if `styles`
    has them. Queries come in their order, each wording once, and no more than `limit`. An answer that is no text holds
    none.
    """
    if not isinstance(answer, str):
        return []
    text = strip_reasoning(_FENCE.sub("", answer))
    lines = [_clean(line) for line in text.splitlines()]
    in_json = _json_lines(text)
    not_requested = _ON_REQUEST.difference(styles)
    lines = [line for line in (lines if in_json is None else in_json) if line.style not in not_requested]
    lines = [line for line in lines if _is_query(line)]
    if in_json is None and any(line.marked for line in lines):
        lines = [line for line in lines if line.marked]
    found: dict[str, ParsedQuery] = {}
    for line in lines:
        found.setdefault(normalise(line.text), line)
    return list(found.values())[:limit]


def strip_reasoning(answer: str) -> str:
    """An answer without the reasoning that some models write in front of it."""
    return _REASONING.sub("", answer).strip()


def _json_lines(text: str) -> list[ParsedQuery] | None:
    """The strings in the answer's JSON, even inside other text or with its end missing; None if there is no JSON."""
    starts = [match.start() for match in re.finditer(r"^\s*[\[{]", text, re.MULTILINE)]
    if not starts:
        return None
    decoder, lines, end = json.JSONDecoder(), [], starts[0]
    broken = False
    for start in starts:
        if start < end:
            continue  # inside a value that was read before
        body = text[start:].lstrip()
        try:
            value, length = decoder.raw_decode(body)
        except (ValueError, RecursionError):
            broken = True
            continue
        end = len(text) - len(body) + length
        lines += list(_from_json(value))
    if broken and not lines and re.match(r'\s*(?:\[\s*["{\[]|\{\s*")', text[starts[0] :]):
        found = list(_TRUNCATED_VALUE.finditer(text)) or list(_TRUNCATED_ITEM.finditer(text))
        lines = [_clean(_unescape(match["text"]), marked=True) for match in found]
    # a line in brackets that is not JSON ("[question] ...") is a line like any other
    return lines if lines or not broken else None


def _unescape(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text


def _from_json(value: Any, style: str | None = None) -> Iterator[ParsedQuery]:
    if isinstance(value, str):
        yield _clean(value, style, marked=True)
    elif isinstance(value, list):
        for item in value:
            yield from _from_json(item, style)
    elif isinstance(value, dict) and "error" not in value:
        style_name = next((s for key in ("style", "type", "kind") if isinstance(s := value.get(key), str)), None)
        for key, item in value.items():
            if isinstance(item, str) and (key in _TEXT_KEYS or _style_of(key)):
                yield from _from_json(item, _style_of(style_name or key))
            elif isinstance(item, (list, dict)):
                yield from _from_json(item, _style_of(key))


def _clean(line: str, style: str | None = None, marked: bool = False) -> ParsedQuery:
    """A line without control characters, bullets, numbers, tags, and emphasis or quotes around the whole."""
    line = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in line)
    line = " ".join(line.split())
    for _ in range(3):  # "1. **Question:** ..." has several layers
        bare = _unwrap(line.lstrip("#> "))  # Markdown headings and quotations
        if mark := _MARK.match(bare):
            bare, marked = _unwrap(bare[mark.end() :]), True
        if tag := _TAG.match(bare):
            style, marked = (tag.lastgroup or "").removeprefix("in_"), True
            bare = _CLOSING_TAG.sub("", bare[tag.end() :])
        if bare == line:
            break
        line = bare
    return ParsedQuery(line, style, marked)


def _unwrap(text: str) -> str:
    """A text without the emphasis and quotes around the whole of it; "`a` or `b`", "*args" and "__init__" stay."""
    text = text.strip()
    run = _RUN.match(text)
    for opening, closing in [(run[0], run[0])] if run else map(tuple, _PAIRS):
        inner = text[len(opening) : -len(closing)]
        between = re.sub(r"\w['’]\w", "", inner)  # apostrophes
        if (
            text.startswith(opening)
            and text.endswith(closing)
            and len(text) > len(opening) + len(closing)
            and opening not in between
            and closing not in between
            and (opening[0] != "_" or " " in inner)
        ):
            return _unwrap(inner)
    # a quote that is never closed, at the end of a truncated answer
    return text[1:] if re.fullmatch(r'["“„«「『][^"“”„«»「」『』]*', text) else text


def _is_query(line: ParsedQuery) -> bool:
    text = line.text
    if len(text) > _MAX_CHARACTERS or sum(c.isalpha() for c in text) < 2:
        return False
    # text with less than half letters, digits and spaces is markup or noise
    if 2 * sum(c.isalnum() or c.isspace() for c in text) < len(text):
        return False
    if text.endswith((":", "：")) or text[0] in "<{[|":
        return False
    return line.style is not None or not _NO_QUERY.match(text)


def _style_of(text: str) -> str | None:
    match = re.match(_STYLE, text, re.IGNORECASE)
    return match.lastgroup if match else None
