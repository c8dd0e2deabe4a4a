"""What all settings can do."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from llama_index_lora_embed.core.errors import ConfigError

S = TypeVar("S", bound="Settings")


class Settings:
    """What all settings can do: name every value that cannot be used, at once."""

    def problems(self) -> list[str]:
        """One line for each setting that cannot be used: name, value, what was expected."""
        raise NotImplementedError

    def checked(self: S) -> S:
        """These settings, if every one of them can be used.

        Raises:
            ConfigError: Naming all that cannot.
        """
        if problems := self.problems():
            raise ConfigError(
                f"{len(problems)} unusable value(s) in {type(self).__name__}",
                "the values named below",
                "Correct them all:",
                problems,
            )
        return self

    def _need(self, found: list[str], name: str, ok: bool, expected: str) -> None:
        if not ok:
            found.append(f"{name}={getattr(self, name)!r}: expected {expected}")


def is_int(value: Any, least: int) -> bool:
    """Whether it is a whole number, no bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any, above: float) -> bool:
    """Whether it is a finite number, no bool, above `above`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > above


def is_share(value: Any) -> bool:
    """Whether it is a number, no bool, from 0 to 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
