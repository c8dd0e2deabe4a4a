"""An LLM by the name of its class, where there is no Python to make one: command line and service."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from llama_index.core.llms import LLM

from llama_index_lora_embed.core.errors import ConfigError

_EXAMPLE = "llama_index.llms.ollama:Ollama"


def load_llm(name: str, options: Mapping[str, Any] | None = None) -> LLM:
    """Import a LlamaIndex LLM class and make an object of it. Only take names from whoever runs the program.

    Args:
        name: "module:Class".
        options: Arguments of the class.

    Raises:
        ConfigError: There is no such class, it is none of an LLM, or it refuses the options.
    """
    module, _, class_name = name.partition(":")
    try:
        found = getattr(import_module(module), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"LLM {name!r}, which cannot be imported ({error})",
            f"module and class, such as {_EXAMPLE}",
            "Install LlamaIndex's package of that LLM, or correct the name.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, LLM)):
        raise ConfigError(f"{name!r}, which is no LLM class", f"one such as {_EXAMPLE}", "Name a subclass of LLM.")
    try:
        return found(**(options or {}))
    except Exception as error:  # each client has errors of its own
        raise ConfigError(
            f"LLM {name!r} with the options {dict(options or {})}, which fails ({error})",
            "what the class takes",
            "Correct the options.",
        ) from error
