"""Texts as they are given, and how long they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_CHUNK = 1000  # texts tokenised at a time, which bounds the memory


def check_text(text: Any) -> str:
    """One text, as `check_texts` has it."""
    return check_texts([text])[0]


def check_texts(texts: Sequence[Any]) -> list[str]:
    """The texts as a model can read them.

    Halves of characters (lone surrogates), which no tokenizer takes, become U+FFFD.

    Raises:
        ConfigError: Something is no string; the first ten are named.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise ConfigError(
            f"texts of type {type(texts).__name__}", "a list of strings", "Put a single text into a list."
        )
    wrong = [
        f"texts[{i}] is of type {type(text).__name__}" for i, text in enumerate(texts) if not isinstance(text, str)
    ]
    if wrong:
        raise ConfigError(
            f"{len(wrong)} thing(s) among {len(texts)} texts that are none",
            "strings; '' for an empty text",
            "Leave them out, or embed node.get_content():",
            wrong[:10],
        )
    return [text if text.isascii() else _whole_characters(text) for text in texts]


def _whole_characters(text: str) -> str:
    # halves that belong together become the character that they are
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def longest_first(texts: Sequence[str]) -> list[int]:
    """Numbers of the texts, the longest first: texts of one length are computed with little padding."""
    return sorted(range(len(texts)), key=lambda i: -len(texts[i]))


def count_tokens(model: SentenceTransformer, texts: Iterable[str], prompt: str = "") -> list[int]:
    """Tokens of each text with its prompt and the special tokens, nothing cut off."""
    # a copy of the tokenizer's backend would be costly; verbose=False keeps it from warning about long texts
    tokenizer = model.tokenizer
    # sentence-transformers puts the texts of a plain chat model into its chat template, which counts too
    chat = "message" in getattr(model[0], "modalities", ())
    counts: list[int] = []
    chunk: list[str] = []

    def flush() -> None:
        if chunk:
            if chat:
                features = model.preprocess(chunk, processing_kwargs={"text": {"truncation": False}})
                counts.extend(features["attention_mask"].sum(dim=1).tolist())
            else:
                encoded = tokenizer(chunk, truncation=False, padding=False, verbose=False)
                counts.extend(len(ids) for ids in encoded["input_ids"])
            chunk.clear()

    for text in texts:
        chunk.append(prompt + text)
        if len(chunk) == _CHUNK:
            flush()
    flush()
    return counts
