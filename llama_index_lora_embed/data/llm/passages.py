"""Texts as they go into prompts: without characters that providers refuse, and short enough for the LLM."""

from __future__ import annotations

import re

from llama_index.core.llms import LLM

# Providers refuse requests with control characters, and with the lone surrogates that broken readers leave.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with a space for each control character and lone surrogate."""
    return _CONTROL.sub(" ", text)


def truncate(text: str, llm: LLM) -> str:
    """The start of a text that fits the LLM's context window beside the prompt and the answer.

    Without the LLM's tokenizer, three ASCII characters or one other character count as a token; English averages four.
    """
    room = max(256, llm.metadata.context_window - max(llm.metadata.num_output, 0) - 512)
    if len(text) <= room:
        return text
    tokens = 0.0
    for position, character in enumerate(text):
        tokens += 1 / 3 if character.isascii() else 1
        if tokens > room:
            return text[:position]
    return text
