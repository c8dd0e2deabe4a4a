"""How a model makes one vector of a text's token vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_index_lora_embed.config import POOLING_MODES
from llama_index_lora_embed.core.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules.pooling import PoolingMode


def set_pooling(model: SentenceTransformer, pooling: str | None) -> None:
    """Change a model's pooling mode in place; None keeps the one in the model's files.

    A plain transformers checkpoint, whose files name none, gets sentence-transformers' default: the last token for a
    causal language model, the mean for all others.

    Raises:
        ConfigError: The mode is unknown, the model has no Pooling module, or its head expects vectors of another size.
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
        kind = "no Pooling module" if found is None else f"a concatenated pooling as the input of its {heads[0]} head"
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
    """Have a last-token model's tokenizer append the end token if its files ask for it.

    transformers 5 uses the post-processor of tokenizer.json and ignores `add_eos_token` in tokenizer_config.json, on
    which e5-mistral-7b-instruct relies: without this, its vector is that of the last word instead of </s> (see mteb's
    e5_instruct.py). The tokenizer is changed in place and saved with the model's adapter.
    """
    tokenizer: Any = model.tokenizer
    path = folder / "tokenizer_config.json"
    if pooling_of(model) != "lasttoken" or not path.is_file() or getattr(tokenizer, "backend_tokenizer", None) is None:
        return
    wanted = json.loads(path.read_text(encoding="utf-8")).get("add_eos_token") is True
    end = tokenizer.eos_token
    if not wanted or end is None or tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        return
    from tokenizers.processors import Sequence, TemplateProcessing

    backend = tokenizer.backend_tokenizer
    own = json.loads(backend.to_str())["post_processor"] or {"type": None}
    pieces, special = ["$A"], {end: tokenizer.eos_token_id}
    if own["type"] == "TemplateProcessing":  # the second of two templates in a row would have no effect
        pieces = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else "$A" for piece in own["single"]]
        special |= {name: token["ids"][0] for name, token in own["special_tokens"].items()}
    template = TemplateProcessing(single=[*pieces, end], special_tokens=list(special.items()))
    keeps_own = own["type"] not in (None, "TemplateProcessing")
    backend.post_processor = Sequence([backend.post_processor, template]) if keeps_own else template
