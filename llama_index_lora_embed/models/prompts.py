"""Query and passage prompts of base models."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
# (pattern of the model's name, query prompt, passage prompt), from the model cards. Only models whose own
# config_sentence_transformers.json lacks prompts need a row; Qwen3-Embedding, EmbeddingGemma and arctic-embed do not.
_PROMPTS: list[tuple[str, str, str]] = [
    (r"^(multilingual-)?e5-(small|base|large)(-v2)?(-unsupervised)?$", "query: ", "passage: "),
    (r"^bge-(small|base|large)-en(-v1\.5)?$", "Represent this sentence for searching relevant passages: ", ""),
    (r"^bge-(small|base|large)-zh(-v1\.5)?$", "为这个句子生成表示以用于检索相关文章：", ""),
    (r"^(multilingual-e5-large|e5-mistral-7b)-instruct$", _WEB_SEARCH, ""),
    # mteb's nomic_models.py has the same prompts for all of these
    (
        r"^(nomic-embed-text-v(1|1\.5|2-moe)(-ablated|-unsupervised)?|modernbert-embed-base)$",
        "search_query: ",
        "search_document: ",
    ),
]
# names under which models record their prompts; e5-mistral-7b-instruct has one for each of its tasks
_QUERY_NAMES = ("query", "web_search_query")
_PASSAGE_NAMES = ("document", "passage")


def set_prompts(
    model: SentenceTransformer, model_id: str, query_prompt: str | None = None, passage_prompt: str | None = None
) -> None:
    """Set `model.prompts["query"]` and `model.prompts["document"]`, which training and inference both use.

    Each is the caller's prompt ("" switches it off), else the one in the model's files, else the one known for the
    model's name, which is the last part of its Hub id or path, else "".
    """
    name = re.split(r"[/\\]", model_id.rstrip("/\\"))[-1]
    known = next((row for row in _PROMPTS if re.match(row[0], name)), ("", "", ""))
    default = model.prompts.get(model.default_prompt_name or "") or ""
    recorded = [
        next((prompt for name in names if (prompt := model.prompts.get(name))), default)
        for names in (_QUERY_NAMES, _PASSAGE_NAMES)
    ]
    query, passage = recorded if any(recorded) else known[1:]
    model.prompts["query"] = query if query_prompt is None else query_prompt
    model.prompts["document"] = passage if passage_prompt is None else passage_prompt
