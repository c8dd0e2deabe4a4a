"""Embedding models by name: prompts and pooling that a copy of their weights may not record."""

from __future__ import annotations

import re
from typing import NamedTuple

_WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "


class Family(NamedTuple):
    """Models that embed in the same way. All of them scale vectors to length 1."""

    pattern: str
    """Regular expression of the models' names."""
    query_prompt: str
    passage_prompt: str
    pooling: str


# From the model cards, whose code for transformers shows the pooling. Only models whose own
# config_sentence_transformers.json lacks prompts need a row; Qwen3-Embedding, EmbeddingGemma and arctic-embed do not.
_FAMILIES = [
    Family(r"^(multilingual-)?e5-(small|base|large)(-v2)?(-unsupervised)?$", "query: ", "passage: ", "mean"),
    Family(
        r"^bge-(small|base|large)-en(-v1\.5)?$", "Represent this sentence for searching relevant passages: ", "", "cls"
    ),
    Family(r"^bge-(small|base|large)-zh(-v1\.5)?$", "为这个句子生成表示以用于检索相关文章：", "", "cls"),
    Family(r"^multilingual-e5-large-instruct$", _WEB_SEARCH, "", "mean"),
    Family(r"^e5-mistral-7b-instruct$", _WEB_SEARCH, "", "lasttoken"),
    # mteb's nomic_models.py has the same prompts for all of these
    Family(
        r"^(nomic-embed-text-v(1|1\.5|2-moe)(-ablated|-unsupervised)?|modernbert-embed-base)$",
        "search_query: ",
        "search_document: ",
        "mean",
    ),
]


def family_of(model_id: str) -> Family | None:
    """The family that a model's name, the last part of its Hub id or path, belongs to."""
    name = re.split(r"[/\\]", model_id.rstrip("/\\"))[-1]
    return next((family for family in _FAMILIES if re.match(family.pattern, name)), None)
