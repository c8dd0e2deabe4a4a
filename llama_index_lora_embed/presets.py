"""What is known of base models beforehand, and what is read off the model itself.

Tables hold only what a model's own files do not say.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llama_index_lora_embed.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# (pattern of the model's name, query prompt, passage prompt), from the model cards. Models whose own
# config_sentence_transformers.json carries prompts (Qwen3-Embedding, snowflake-arctic) need no row.
_PROMPTS: list[tuple[str, str, str]] = [
    (r"^(multilingual-)?e5-(small|base|large)(-v2)?(-unsupervised)?$", "query: ", "passage: "),
    (
        r"^bge-(small|base|large)-en(-v1\.5)?$",
        "Represent this sentence for searching relevant passages: ",
        "",
    ),
    (r"^bge-(small|base|large)-zh(-v1\.5)?$", "为这个句子生成表示以用于检索相关文章：", ""),
]


def set_prompts(
    model: SentenceTransformer,
    model_id: str,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
) -> None:
    """Put the query and passage prompts into `model.prompts`, where training and serving both find them.

    For each of the two: what the caller says, else what the model's own files say, else the table, else "".

    Args:
        model: Loaded model; its `prompts["query"]` and `prompts["document"]` are set in place.
        model_id: Hub id or path; the last part of it is looked up in the table.
        query_prompt: Overrides the query prompt; "" switches it off.
        passage_prompt: Overrides the passage prompt.
    """
    name = re.split(r"[/\\]", model_id.rstrip("/\\"))[-1]
    row = next((r for r in _PROMPTS if re.match(r[0], name)), ("", "", ""))
    fallback = model.prompts.get(model.default_prompt_name or "") or ""
    own_query = model.prompts.get("query") or fallback
    own_passage = model.prompts.get("document") or model.prompts.get("passage") or fallback
    says_something = bool(own_query or own_passage)
    model.prompts["query"] = _first(query_prompt, own_query if says_something else row[1])
    model.prompts["document"] = _first(passage_prompt, own_passage if says_something else row[2])


def _first(override: str | None, otherwise: str) -> str:
    return otherwise if override is None else override


def lora_target_modules(model: SentenceTransformer) -> list[str]:
    """Names of the linear layers that the default LoRA adapts: all those inside the transformer's layers.

    Looked up in the model instead of assumed, so that fused projections are found; what stands outside the
    layers (BERT's unused pooler, an output head) is left alone.

    Returns:
        Module suffixes as peft's `target_modules` takes them, e.g. "attention.self.query".

    Raises:
        ConfigError: The model has no transformer layers with linear modules.
    """
    import torch

    transformer = model.transformers_model
    names: set[str] = set()
    if transformer is not None:
        for name, module in transformer.named_modules():
            match = re.match(r"^.*?\.?\d+\.(.+)$", name)  # the part after the layer's number
            if match and isinstance(module, torch.nn.Linear):
                names.add(match[1])
    if not names:
        raise ConfigError(
            f"a model of type {type(transformer).__name__} without linear modules in numbered layers",
            "a transformer encoder or decoder",
            "Name the modules yourself: lora_config=peft.LoraConfig(target_modules=[...]).",
        )
    return sorted(names)


def longest_input(model: SentenceTransformer) -> int:
    """Tokens that the model's positions allow, special tokens included.

    RoBERTa and its kin count positions from `padding_idx + 1`, so their table of 514 holds 512 tokens.
    A model without a limit of its own is given 8192.
    """
    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return 8192
    transformer = model.transformers_model
    table = getattr(getattr(transformer, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return limit if offset is None else limit - offset - 1
