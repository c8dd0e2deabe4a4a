"""The space of a sweep: which settings of the training are varied, and over which values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from llama_index_lora_embed.config.base import NOT_IN_RESULT
from llama_index_lora_embed.config.finetune import FinetuneConfig
from llama_index_lora_embed.config.training import TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds.

    Attributes:
        low: The lowest.
        high: The highest.
        log: Draw their logarithms evenly, so that 0.001 to 0.01 is as wide as 0.01 to 0.1.
    """

    low: float
    high: float
    log: bool = True


Space: TypeAlias = Mapping[str, Sequence[Any] | Range]
"""Fields of `TrainingSettings` by name, each with the values to choose from, or a `Range`."""
DEFAULT_SPACE: Space = {
    "learning_rate": Range(1e-4, 3e-3),
    "lora_r": (8, 16, 32),
    "batch_size": (16, 32, 64),
    "temperature": Range(0.02, 0.1),
}
"""About the defaults of `TrainingSettings`. `lora_alpha` stays, so that a higher rank is a smaller scale."""
_RANGE = tuple(field.name for field in dataclasses.fields(Range))


def checked_space(values: Mapping[str, Any], config: FinetuneConfig) -> dict[str, tuple[Any, ...] | Range]:
    """A space from its own values, or from those of a file, in which a mapping of low, high and log is a `Range`.

    Args:
        values: The space.
        config: What the values are tried in.

    Raises:
        ConfigError: Some names or values cannot be used; all of them are named.
    """
    fields = TrainingSettings.model_fields
    allowed = [name for name, field in fields.items() if NOT_IN_RESULT not in field.metadata]
    space: dict[str, tuple[Any, ...] | Range] = {}
    problems = [] if values else ["no field at all"]
    for name, given in values.items():
        if name not in allowed:
            problems.append(f"{name}: expected one of {', '.join(allowed)}")
            continue
        if isinstance(given, Mapping):
            try:
                given = Range(**given)
            except TypeError:
                problems.append(f"{name}={given!r}: expected a mapping with {', '.join(_RANGE)}")
                continue
        if isinstance(given, Range):
            if problem := _range_problem(given):
                problems.append(f"{name}={given}: expected {problem}")
                continue
            tried: tuple[Any, ...] = (given.low, given.high)
            space[name] = given
        elif isinstance(given, Sequence) and not isinstance(given, str) and given:
            tried = space[name] = tuple(given)
        else:
            problems.append(f"{name}={given!r}: expected a list of values, or a range")
            continue
        for value in tried:
            try:
                config.training.replace(**{name: value})
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(
            f"a space with {len(problems)} problem(s)",
            "fields of TrainingSettings, each with a list of values or a range",
            "For example {'learning_rate': Range(1e-4, 1e-3), 'lora_r': [8, 16]}:",
            problems,
        )
    return space


def _range_problem(given: Range) -> str | None:
    bounds = (given.low, given.high)
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in bounds):
        return "two numbers"
    if given.low >= given.high:
        return "low below high"
    return "low above 0, or log=False" if given.log and given.low <= 0 else None
