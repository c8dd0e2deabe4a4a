"""How a model makes one vector of a text's token vectors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_index_lora_embed.config import POOLING_MODES
from llama_index_lora_embed.core.errors import AdapterError, ConfigError
from llama_index_lora_embed.models.families import family_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules.pooling import PoolingMode


logger = logging.getLogger(__name__)


def choose_pooling(model: SentenceTransformer, folder: Path, model_id: str, pooling: str | None) -> None:
    """Set what a loaded base does after its transformer, in place.

    That is what the model's files name. A plain transformers checkpoint, whose files name nothing, is pooled and scaled
    to length 1 as the family of its name, or pooled by sentence-transformers' default with a warning: the last token
    for a causal language model, the mean for all others. The caller's `pooling` replaces the mode alone.

    Raises:
        ConfigError: As `set_pooling`.
    """
    from sentence_transformers.base.modules import Normalize

    if not records_pooling(folder):
        family = family_of(model_id)
        if family is not None:
            pooling = pooling or family.pooling
            model.append(Normalize())
        elif pooling is None:
            logger.warning(
                "The files of %s name no pooling; it is sentence-transformers' default, %r, unless pooling= is given.",
                model_id,
                pooling_of(model),
            )
    set_pooling(model, pooling)


def records_pooling(folder: Path) -> bool:
    """Whether a model's files name the modules after its transformer; those of plain transformers and peft do not."""
    return (folder / "modules.json").is_file()


def set_pooling(model: SentenceTransformer, pooling: str | None) -> None:
    """Change a model's pooling mode in place; None leaves it.

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


def load_tokenizer(folder: Path, pooling: str | None) -> Any:
    """The tokenizer in an adapter directory, which appends the end token as `append_end_token` says.

    Raises:
        AdapterError: It does not load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(
            f"a tokenizer in {str(folder)!r} that does not load ({error})",
            "one that AutoTokenizer loads",
            "Remove its files, and the adapter takes its base's tokenizer.",
        ) from error
    append_end_token(tokenizer, folder, pooling)
    return tokenizer


def append_end_token(tokenizer: Any, folder: Path, pooling: str | None) -> None:
    """Have the tokenizer of a last-token model append the end token if the files in its folder ask for it.

    transformers 5 uses the post-processor of tokenizer.json and ignores `add_eos_token` in tokenizer_config.json, on
    which e5-mistral-7b-instruct relies: without this, its vector is that of the last word instead of </s> (see mteb's
    e5_instruct.py). The tokenizer is changed in place and saved with the model's adapter.
    """
    path = folder / "tokenizer_config.json"
    if pooling != "lasttoken" or not path.is_file() or getattr(tokenizer, "backend_tokenizer", None) is None:
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
