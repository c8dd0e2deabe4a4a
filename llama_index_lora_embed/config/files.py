"""Reading configuration files: YAML, TOML or JSON to plain values."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_index_lora_embed.core.errors import ConfigError


def read_values(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a YAML (`.yaml`, `.yml`), TOML (`.toml`) or JSON (`.json`) file holds.

    Raises:
        ConfigError: The file has another ending, cannot be read, or holds no mapping.
    """
    try:
        values = _READERS[Path(path).suffix.lower()](Path(path).read_text(encoding="utf-8"))
    except KeyError:
        raise ConfigError(
            f"a configuration file named {Path(path).name!r}",
            f"one that ends in {', '.join(_READERS)}",
            "Rename it, or convert it.",
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r}, which cannot be read: {error}", "a YAML, TOML or JSON file", "Correct the file."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{str(path)!r} with a {type(values).__name__} at the top",
            "a mapping of fields",
            "See docs/configuration.",
        )
    return values


def parse_yaml(text: str) -> Any:
    """YAML with the floats of YAML 1.2: PyYAML alone reads 1e-3 as text.

    Raises:
        ValueError: It is no YAML.
    """
    import re

    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        pass

    number = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def parse_yaml_mapping(text: str, name: str) -> dict[str, Any]:
    """A YAML mapping on one line, as it is typed.

    Raises:
        ConfigError: It is none; the message calls it `name`.
    """
    try:
        values = parse_yaml(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{name}={text!r}", "a YAML mapping", "Write it as '{model: llama3.2, temperature: 0}'.")
    return values


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


_READERS: dict[str, Callable[[str], Any]] = {
    ".yaml": parse_yaml,
    ".yml": parse_yaml,
    ".toml": _toml,
    ".json": json.loads,
}
