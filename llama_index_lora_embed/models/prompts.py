"""Query and passage prompts of base models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_index_lora_embed.models.families import family_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

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
    family = family_of(model_id)
    known = (family.query_prompt, family.passage_prompt) if family else ("", "")
    default = model.prompts.get(model.default_prompt_name or "") or ""
    recorded = [
        next((prompt for name in names if (prompt := model.prompts.get(name))), default)
        for names in (_QUERY_NAMES, _PASSAGE_NAMES)
    ]
    query, passage = recorded if any(recorded) else known
    model.prompts["query"] = query if query_prompt is None else query_prompt
    model.prompts["document"] = passage if passage_prompt is None else passage_prompt
