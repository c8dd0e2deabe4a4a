"""One class for each thing that a user can hint, every message with got, expected and the hint; and warnings."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

__all__ = [
    "AdapterError",
    "BaseModelMismatchError",
    "ConfigError",
    "DatasetError",
    "DeviceMemoryError",
    "ExportError",
    "HubError",
    "JournalError",
    "JournalInUseError",
    "LLMError",
    "LoraEmbedError",
    "MissingExtraError",
    "ModelNotFoundError",
    "NonFiniteLossError",
    "OutputDirectoryError",
    "SplitError",
    "UnsafeCheckpointError",
    "WrongIndexError",
]

_SHOWN = 20
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep  # the whole package


def warn_user(message: str) -> None:
    """Warn with a `UserWarning` that points at the line of the user's own code, however deep in this package it is."""
    level, outermost = 2, 1
    while level < 100:
        try:
            frame = sys._getframe(level - 1)
        except ValueError:
            break
        if frame.f_code.co_filename.startswith(_HERE):
            outermost = level  # other libraries' frames can lie between ours
        level += 1
    level = outermost + 1
    warnings.warn(message, UserWarning, stacklevel=level)


class LoraEmbedError(Exception):
    """Base of all errors that this package raises on purpose.

    Args:
        got: What was found, with the offending value.
        expected: What would have been right.
        hint: What the user can do about it.
    """

    def __init__(self, got: str, expected: str, hint: str) -> None:
        super().__init__(got, expected, hint)
        self.got = got
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        return f"got {self.got}; expected {self.expected}. {self.hint}"


class _ListedError(LoraEmbedError):
    """An error with several problems, all of them named at once."""

    def __init__(self, got: str, expected: str, hint: str, problems: Sequence[str] = ()) -> None:
        super().__init__(got, expected, hint)
        self.problems = list(problems)
        self.args = (got, expected, hint, self.problems)  # so that pickling keeps the list

    def __str__(self) -> str:
        lines = [f"  - {problem}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  - and {len(self.problems) - _SHOWN} more in the error's .problems")
        return "\n".join([super().__str__(), *lines])


class ConfigError(_ListedError, ValueError):
    """Arguments are wrong; `.problems` holds one line for each of them."""


class DatasetError(_ListedError, ValueError):
    """A dataset cannot be trained on or evaluated with; `.problems` names every offending id."""


class JournalError(LoraEmbedError):
    """A journal of LLM answers is of another format, in use, or cannot be written."""


class JournalInUseError(JournalError):
    """Another run has the journal open."""


class LLMError(LoraEmbedError):
    """An LLM gave no usable answer."""


class SplitError(LoraEmbedError, ValueError):
    """A corpus cannot be split into training and validation by source document."""


class ModelNotFoundError(LoraEmbedError, FileNotFoundError):
    """A model id or path leads to no loadable sentence-transformers or transformers model."""

    __str__ = LoraEmbedError.__str__  # OSError's own would print the first two arguments as errno


class BaseModelMismatchError(LoraEmbedError):
    """The base model's weights are not those that the adapter was trained on."""


class AdapterError(LoraEmbedError):
    """An adapter directory is damaged, incomplete, or does not fit its base model."""


class WrongIndexError(LoraEmbedError):
    """An index was built with another embedding model than the one that it is asked with."""


class UnsafeCheckpointError(AdapterError):
    """Weights are stored in a pickle, which can run code when loaded."""


class OutputDirectoryError(LoraEmbedError):
    """The output directory cannot be written, or writing there would destroy somebody's files."""


class ExportError(LoraEmbedError):
    """A model cannot be exported, or what was exported is too far from it."""


class HubError(LoraEmbedError):
    """The Hugging Face Hub cannot be reached, or does not allow what was asked of it."""


class NonFiniteLossError(LoraEmbedError):
    """A loss or the vectors of a model became NaN or infinite."""


class DeviceMemoryError(LoraEmbedError):
    """A device's memory does not hold a training step."""


class MissingExtraError(LoraEmbedError, ImportError):
    """An optional dependency is not installed; the message is the install command."""
