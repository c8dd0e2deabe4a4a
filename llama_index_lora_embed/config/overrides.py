"""The fields of `FinetuneConfig` one by one, and a configuration from a file with texts over some of them.

The command line makes its flags of this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from llama_index_lora_embed.config.base import model_in
from llama_index_lora_embed.config.files import parse_yaml, read_values
from llama_index_lora_embed.config.finetune import FLAT_GROUPS, FinetuneConfig
from llama_index_lora_embed.core.errors import ConfigError


@dataclass(frozen=True)
class ConfigField:
    """A field of `FinetuneConfig`, or of settings inside it.

    Attributes:
        path: Its place, such as "training.epochs" or "data.filters.max_copied".
        kind: What it takes, in short: "integer", "bf16|fp32", "text|null".
        default: Its default as JSON; None where it is settings of their own, whose fields say theirs.
        description: Its description.
    """

    path: str
    kind: str
    default: str | None
    description: str

    @property
    def name(self) -> str:
        """Its name among flat arguments: "epochs", "objective.guide"."""
        group, _, rest = self.path.partition(".")
        return rest if group in FLAT_GROUPS else self.path

    @property
    def group(self) -> str:
        """The path of the settings that it is in; "" at the top."""
        return self.path.rpartition(".")[0]

    @property
    def is_switch(self) -> bool:
        """Whether it is either true or false."""
        return self.kind == "boolean"

    def parse(self, text: str) -> Any:
        """The value that a text stands for: itself where the field takes nothing but text, else what YAML reads.

        Raises:
            ValueError: It is no YAML.
        """
        kinds = set(self.kind.split("|"))
        if text == "null" and "null" in kinds:
            return None
        return text if kinds.isdisjoint(_NOT_TEXT) else parse_yaml(text)


_NOT_TEXT = ("boolean", "integer", "list", "mapping", "number", "settings")
_KINDS = {"string": "text", "array": "list", "object": "mapping"}


def config_fields() -> list[ConfigField]:
    """Every field of `FinetuneConfig` that is not merely a group of others, in the order of the classes."""
    return list(_fields_of(FinetuneConfig, ""))


def config_from(path: str | os.PathLike[str] | None, texts: Mapping[str, str | bool]) -> FinetuneConfig:
    """A configuration from a file with other values for some fields; all errors of both at once.

    Args:
        path: What `FinetuneConfig.from_file` takes; None for the defaults.
        texts: Values by the paths of fields (`ConfigField.path`), as a user types them. Where the file has an
            objective's name or nothing, fields inside it can be set all the same.

    Raises:
        ConfigError: The file cannot be read, or some values are wrong; `.problems` names all of them by their path.
    """
    values = {} if path is None else read_values(path)
    fields = {field.path: field for field in config_fields()}
    problems = []
    for place in sorted(texts, key=lambda place: place.count(".")):
        text = texts[place]
        try:
            _put(values, place.split("."), text if isinstance(text, bool) else fields[place].parse(text))
        except ValueError as error:
            problems.append(f"{place}={text!r}: expected YAML; {' '.join(str(error).split())}")
    try:
        config = FinetuneConfig.from_json_values(values)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(
            f"{len(problems)} wrong value(s) for FinetuneConfig", "the values named below", "Correct them:", problems
        )
    return config


def _put(values: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        inner = values.get(part)
        if isinstance(inner, str):  # an objective by its name alone
            inner = {"name": inner}
        values[part] = dict(inner) if isinstance(inner, dict) else {}
        values = values[part]
    values[parts[-1]] = value


def _fields_of(settings: type[BaseModel], prefix: str) -> Iterator[ConfigField]:
    schemas = settings.model_json_schema()["properties"]
    for name, field in settings.model_fields.items():
        inner = None if _is_list(field) else model_in(field.annotation)
        path = f"{prefix}{name}"
        if path not in FLAT_GROUPS:
            yield ConfigField(
                path,
                "|".join(dict.fromkeys(_kinds(schemas[name]))),
                None if inner is not None else _default(field),
                " ".join((field.description or "").split()),
            )
        if inner is not None:
            yield from _fields_of(inner, f"{path}.")


def _is_list(field: FieldInfo) -> bool:
    """Whether it holds several settings."""
    return "tuple" in str(field.annotation)


def _default(field: FieldInfo) -> str:
    return json.dumps(to_jsonable_python(field.get_default(call_default_factory=True)))


def _kinds(schema: Mapping[str, Any]) -> Iterator[str]:
    for branch in schema.get("anyOf", [schema]):
        if "$ref" in branch or "allOf" in branch:
            yield "settings"
        elif "enum" in branch or "const" in branch:
            yield from branch.get("enum", [branch.get("const")])
        else:
            kind = str(branch.get("type", "text"))
            yield _KINDS.get(kind, kind)
