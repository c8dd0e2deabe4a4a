"""Input texts: their checks, their lengths in tokens, and how many tokens a model can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_CHUNK = 1000  # texts tokenised at a time, which bounds the memory


def check_text(text: Any) -> str:
    """One text, checked as in `check_texts`."""
    return check_texts([text])[0]


def check_texts(texts: Sequence[Any]) -> list[str]:
    """Check that all inputs are strings, and replace lone surrogates, which no tokenizer accepts, by U+FFFD.

    Raises:
        ConfigError: Some inputs are not strings; the first ten are named.
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
            f"{len(wrong)} of {len(texts)} inputs that are not strings",
            "strings; '' for an empty text",
            "Leave these out, or pass node.get_content():",
            wrong[:10],
        )
    # surrogates that form a pair become the character that they encode
    return [
        text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        for text in texts
    ]


def longest_first(texts: Sequence[str]) -> list[int]:
    """Indices of the texts, the longest first: batches of texts of one length contain little padding."""
    return sorted(range(len(texts)), key=lambda i: -len(texts[i]))


def count_tokens(model: SentenceTransformer, texts: Iterable[str], prompt: str = "") -> list[int]:
    """Number of tokens of each text, with its prompt and the special tokens and without truncation."""
    tokenizer = model.tokenizer
    # sentence-transformers puts the texts of a plain chat model into its chat template, which counts too
    chat = "message" in getattr(model[0], "modalities", ())
    counts: list[int] = []
    prompted = (prompt + text for text in texts)
    while chunk := list(islice(prompted, _CHUNK)):
        if chat:
            features = model.preprocess(chunk, processing_kwargs={"text": {"truncation": False}})
            counts.extend(features["attention_mask"].sum(dim=1).tolist())
        else:
            # verbose=False: no warning about texts beyond the model's length
            encoded = tokenizer(chunk, truncation=False, padding=False, verbose=False)
            counts.extend(len(ids) for ids in encoded["input_ids"])
    return counts


def longest_input(model: SentenceTransformer) -> int:
    """Tokens that the model's positions allow, special tokens included.

    RoBERTa, XLM-R and MPNet count positions from `padding_idx + 1`, so that a table of 514 positions holds 512 tokens.
    The limit is 8192 for a model without one of its own.
    """
    config = model.config
    text_config = getattr(config, "get_text_config", None)  # multimodal models keep it one level deeper
    limit = getattr(config if text_config is None else text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return 8192
    table = getattr(getattr(model.transformers_model, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return limit if offset is None else limit - offset - 1
