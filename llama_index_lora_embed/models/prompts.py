"""What is known of base models beforehand, and what is read off the model itself.

Tables hold only what a model's own files do not say.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_index_lora_embed.core.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules.pooling import PoolingMode

_WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
# (pattern of the model's name, query prompt, passage prompt), from the model cards. Models whose own
# config_sentence_transformers.json carries prompts (Qwen3-Embedding, EmbeddingGemma, snowflake-arctic) need no row.
_PROMPTS: list[tuple[str, str, str]] = [
    (r"^(multilingual-)?e5-(small|base|large)(-v2)?(-unsupervised)?$", "query: ", "passage: "),
    (
        r"^bge-(small|base|large)-en(-v1\.5)?$",
        "Represent this sentence for searching relevant passages: ",
        "",
    ),
    (r"^bge-(small|base|large)-zh(-v1\.5)?$", "为这个句子生成表示以用于检索相关文章：", ""),
    (r"^(multilingual-e5-large|e5-mistral-7b)-instruct$", _WEB_SEARCH, ""),
    # mteb's nomic_models.py has the same for all of these
    (
        r"^(nomic-embed-text-v(1|1\.5|2-moe)(-ablated|-unsupervised)?|modernbert-embed-base)$",
        "search_query: ",
        "search_document: ",
    ),
]
# names under which models record them; e5-mistral-7b-instruct has one for each of its tasks
_QUERY_NAMES = ("query", "web_search_query")
_PASSAGE_NAMES = ("document", "passage")

POOLING_MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")
"""How sentence-transformers' Pooling makes one vector of a text's token vectors."""


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
    own_query, own_passage = (
        next((prompt for name in names if (prompt := model.prompts.get(name))), fallback)
        for names in (_QUERY_NAMES, _PASSAGE_NAMES)
    )
    says_something = bool(own_query or own_passage)
    model.prompts["query"] = _first(query_prompt, own_query if says_something else row[1])
    model.prompts["document"] = _first(passage_prompt, own_passage if says_something else row[2])


def _first(override: str | None, otherwise: str) -> str:
    return otherwise if override is None else override


def set_pooling(model: SentenceTransformer, pooling: str | None) -> None:
    """Change how token vectors become one vector; None leaves it as the model's files say.

    A plain transformers checkpoint, which says nothing, gets sentence-transformers' own choice: the last token for a
    causal language model, the mean for everything else.

    Args:
        model: Loaded base; its Pooling module is changed in place, so that it is saved with an adapter.
        pooling: One of `POOLING_MODES`.

    Raises:
        ConfigError: No such mode, no Pooling module, or a head that wants vectors of another size.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    if pooling is None:
        return
    if pooling not in POOLING_MODES:
        modes = ", ".join(repr(mode) for mode in POOLING_MODES)
        raise ConfigError(f"pooling={pooling!r}", f"one of {modes}, or None", "None keeps the model's own pooling.")
    found = next((module for module in model if isinstance(module, Pooling)), None)
    heads = [type(module).__name__ for module in list(model)[2:] if hasattr(module, "in_features")]
    if found is None or (heads and found.get_embedding_dimension() != found.embedding_dimension):
        kind = "no Pooling module" if found is None else f"a concatenated pooling that its {heads[0]} head is made for"
        raise ConfigError(
            f"pooling={pooling!r} for a model with {kind}", "a model with one pooling mode", "Leave pooling=None."
        )
    found.pooling_mode = cast("PoolingMode", pooling)
    found.pooling_output_dimension = found.embedding_dimension


def pooling_of(model: SentenceTransformer) -> str | None:
    """The pooling mode, several joined with "+"; None for a model without a Pooling module."""
    for module in model:
        mode = getattr(module, "pooling_mode", None)
        if mode is not None:
            return mode if isinstance(mode, str) else "+".join(mode)
    return None


def append_end_token(model: SentenceTransformer, folder: Path) -> None:
    """Put the end token back that a last-token model's tokenizer is configured to append.

    transformers 5 takes the post-processor of tokenizer.json and passes over `add_eos_token` in tokenizer_config.json,
    on which e5-mistral-7b-instruct relies: its vector would be that of the last word instead of </s> (see mteb's
    e5_instruct.py). Nothing is appended where the files do not ask for it.

    Args:
        model: Loaded base; its tokenizer is changed in place, so that it is saved with an adapter.
        folder: Where its files are.
    """
    tokenizer: Any = model.tokenizer
    path = folder / "tokenizer_config.json"
    if pooling_of(model) != "lasttoken" or not path.is_file() or getattr(tokenizer, "backend_tokenizer", None) is None:
        return
    asked = json.loads(path.read_text(encoding="utf-8")).get("add_eos_token") is True
    end = tokenizer.eos_token
    if not asked or end is None or tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        return
    from tokenizers.processors import Sequence, TemplateProcessing

    backend = tokenizer.backend_tokenizer
    own = json.loads(backend.to_str())["post_processor"] or {"type": None}
    pieces, special = ["$A"], {end: tokenizer.eos_token_id}
    if own["type"] == "TemplateProcessing":  # of two in a row, the second does nothing
        pieces = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else "$A" for piece in own["single"]]
        special |= {name: token["ids"][0] for name, token in own["special_tokens"].items()}
    template = TemplateProcessing(single=[*pieces, end], special_tokens=list(special.items()))
    keeps_own = own["type"] not in (None, "TemplateProcessing")
    backend.post_processor = Sequence([backend.post_processor, template]) if keeps_own else template


SHORTEST_WINDOW = 16
"""Tokens of the shortest window (`windows.add_windows`); less would be mostly special tokens and prompt."""


def longest_input(model: SentenceTransformer) -> int:
    """Tokens that the model's positions allow, special tokens included.

    RoBERTa and its kin (XLM-R, MPNet) count positions from `padding_idx + 1`, so their table of 514 holds 512 tokens.
    A model without a limit of its own is given 8192.
    """
    config = model.config
    text_config = getattr(config, "get_text_config", None)  # multimodal models keep it a level deeper
    limit = getattr(config if text_config is None else text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return 8192
    transformer = model.transformers_model
    table = getattr(getattr(transformer, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return limit if offset is None else limit - offset - 1
