"""Flags from the fields of `FinetuneConfig`: name, type, default and description are the field's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from llama_index_lora_embed.cli.command import MARKUP
from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.config.finetune import FLAT_GROUPS
from llama_index_lora_embed.config.overrides import ConfigField, config_fields, config_from

F = TypeVar("F", bound=Callable[..., Any])
CONFIG = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="YAML, TOML or JSON file; flags win over it."),
]


def normal_name(name: str) -> str:
    """A flag's name as it is registered: `training.learning_rate` and `learning_rate` are `learning-rate`."""
    group, _, rest = name.partition(".")
    return (rest if rest and group in FLAT_GROUPS else name).replace("_", "-")


def takes_config(*groups: str) -> Callable[[F], F]:
    """Give a function whose first parameter is a `FinetuneConfig` the option `--config` and a flag for each field.

    Args:
        groups: Settings whose fields are flags ("data", "mining"), without those of other groups; none for all.
    """

    def decorate(function: F) -> F:
        fields = [f for f in config_fields() if not groups or f.path.partition(".")[0] in groups]

        def run(*, config: Path | None = None, **values: Any) -> Any:
            paths = {_identifier(field): field.path for field in fields}
            flags = {paths[key]: values.pop(key) for key in list(values) if key in paths}
            given = {path: value for path, value in flags.items() if value is not None}
            return function(config_from(config, given), **values)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        one = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=CONFIG)
        run.__signature__ = inspect.Signature([one, *_keyword_only(own), *map(_parameter, fields)])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        return run  # type: ignore[return-value]

    return decorate


def _keyword_only(parameters: Iterable[inspect.Parameter]) -> list[inspect.Parameter]:
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]


def _identifier(field: ConfigField) -> str:
    return "config_" + field.path.replace(".", "__")


def _parameter(field: ConfigField) -> inspect.Parameter:
    name, default = normal_name(field.name), field.default
    option = typer.Option(
        f"--{name}/--no-{name}" if field.is_switch else f"--{name}",
        metavar=None if field.is_switch else f"<{field.kind}>",
        help=_escaped(field.description + (f" [default: {default}]" if default not in (None, "null") else "")),
        rich_help_panel=field.group or FinetuneConfig.__name__,
        show_default=False,
    )
    kind = bool | None if field.is_switch else str | None
    annotation: Any = Annotated[kind, option]
    return inspect.Parameter(_identifier(field), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _escaped(text: str) -> str:
    """Without what rich would read as a style."""
    return text.replace("[", "\\[") if MARKUP else text
