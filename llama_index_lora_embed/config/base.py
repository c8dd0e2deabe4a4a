"""What all settings share: frozen pydantic models whose errors name every wrong field at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.core.files import model_place

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

T = TypeVar("T")
S = TypeVar("S", bound="Settings")


class _NotInResult:
    """Marks a field that does not decide which weights are trained: a resumed run may change it."""


NOT_IN_RESULT = _NotInResult()

AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
"""From 0 to 1."""
ShareBelow1 = Annotated[float, Field(ge=0, lt=1)]
ShareAbove0 = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
PathText = Annotated[Text, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
"""A path as text; an `os.PathLike` is taken, too."""
ModelText = Annotated[
    Text, BeforeValidator(lambda value: model_place(value) if isinstance(value, (str, os.PathLike)) else value)
]
"""A model's folder or Hub id as text, without LlamaIndex's "local:"; an `os.PathLike` is taken, too."""


class _SettingsMeta(ModelMetaclass):
    """Constructing settings raises this package's error; pydantic builds nested settings without coming here."""

    def __call__(cls: type[T], *args: Any, **values: Any) -> T:
        try:
            return super().__call__(*args, **values)  # type: ignore[misc, no-any-return]
        except ValidationError as error:
            raise config_error(cls, error) from None  # type: ignore[arg-type]


class Settings(BaseModel, metaclass=_SettingsMeta):
    """Frozen settings. Each field has its default, its check and its description here and nowhere else."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def validated(cls: type[S], values: Mapping[str, Any]) -> S:
        """Settings from plain values, nested settings as mappings.

        Raises:
            ConfigError: Some values are wrong; `.problems` names every one of them by its path.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise config_error(cls, error) from None

    def replace(self: S, **changes: Any) -> S:
        """These settings with other values for some fields.

        Raises:
            ConfigError: Some values are wrong.
        """
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    def result_affecting(self) -> dict[str, Any]:
        """The fields that decide which weights are trained, as JSON values."""
        fields = type(self).model_fields
        return self.model_dump(mode="json", exclude={name for name in fields if NOT_IN_RESULT in fields[name].metadata})


def config_error(cls: type[BaseModel], error: ValidationError) -> ConfigError:
    """Pydantic's error as one of this package: each wrong field by its path, with its value and what was expected."""
    problems = field_problems(cls, error)
    return ConfigError(
        f"{len(problems)} wrong value(s) for {cls.__name__}", "the values named below", "Correct them:", problems
    )


def field_problems(cls: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each wrong field of a pydantic error, in the order of the fields."""
    lines: dict[str, str] = {}
    for entry in error.errors(include_url=False):
        model, path, field = _locate(cls, entry["loc"])
        if entry["type"] == "extra_forbidden":
            close = difflib.get_close_matches(path.rpartition(".")[2], model.model_fields)
            meant = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(model.model_fields)}"
            line = f"{path}: unknown; {meant}"
        elif entry["type"] == "value_error":  # a validator of ours, which says it whole
            line = (f"{path}: " if path else "") + str(entry["ctx"]["error"])
        else:
            expected = _expected(model.model_json_schema()["properties"][field])
            line = f"{path}={entry['input']!r:.200}: expected {expected}"
        lines.setdefault(path if entry["type"] != "value_error" else line, line)
    return list(lines.values())


def _locate(cls: type[BaseModel], location: Sequence[int | str]) -> tuple[type[BaseModel], str, str]:
    """The model that an error lies in, the path as a user writes it, and the field; union branches are left out."""
    model, path = cls, ""
    for position, part in enumerate(location):
        name = str(part)
        path = f"{path}.{name}" if path else name
        field = model.model_fields.get(name)
        if field is None or position + 1 == len(location):
            return model, path, name
        inner = model_in(field.annotation)
        if inner is None:
            return model, path, name
        model = inner
        if isinstance(location[position + 1], int):  # an item of a list of settings
            path = f"{path}[{location[position + 1]}]"
            return _locate_item(model, path, location[position + 2 :])
    return model, path, ""


def _locate_item(model: type[BaseModel], path: str, location: Sequence[int | str]) -> tuple[type[BaseModel], str, str]:
    inner, rest, field = _locate(model, location)
    return inner, f"{path}.{rest}" if rest else path, field


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings class in an annotation such as `MiningSettings | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if (found := model_in(part)) is not None:
            return found
    return None


def _expected(schema: Mapping[str, Any]) -> str:
    """What a field takes, in words, from its JSON schema."""
    if "$ref" in schema:
        return f"{schema['$ref'].rpartition('/')[2]} or a mapping of its fields"
    if "anyOf" in schema:
        return " or ".join(_expected(branch) for branch in schema["anyOf"])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    kinds = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "True or False",
             "null": "None", "array": "a list", "object": "a mapping"}  # fmt: skip
    words = kinds.get(str(schema.get("type")), "another value")
    if "examples" in schema:
        return f"{words} such as {', '.join(map(repr, schema['examples']))}"
    if isinstance(schema.get("items"), Mapping):
        words += f" of {_expected(schema['items'])}"
    bounds = {"minLength": "of at least {} character", "minimum": "of at least {}", "exclusiveMinimum": "above {}",
              "maximum": "at most {}", "exclusiveMaximum": "below {}"}  # fmt: skip
    limits = [text.format(schema[name]) for name, text in bounds.items() if name in schema]
    return f"{words} {' and '.join(limits)}" if limits else words


def is_int(value: Any, least: int) -> bool:
    """Whether it is an integer, not a bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_share(value: Any) -> bool:
    """Whether it is a number, not a bool, from 0 to 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
