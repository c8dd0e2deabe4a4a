"""llama-index-finetuning, where it is installed: our engine is one of its family."""

from __future__ import annotations

import importlib.util
import logging

from llama_index_lora_embed.core.errors import MissingExtraError
from llama_index_lora_embed.core.optional import require

logger = logging.getLogger(__name__)


def register_legacy_base_class(engine: type) -> None:
    """Make a class a virtual subclass of llama-index-finetuning's engine base class, if that package imports.

    Args:
        engine: The class.
    """
    try:
        if importlib.util.find_spec("llama_index.finetuning") is None:
            return
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        old = require("llama_index.finetuning")
        root.handlers[:] = handlers  # importing it sends every library's INFO to stdout
        root.setLevel(level)
    except (MissingExtraError, ValueError) as error:  # installed, but its own dependencies moved on
        logger.info("llama-index-finetuning does not import: %s", error)
        return
    old.types.BaseEmbeddingFinetuneEngine.register(engine)
