"""The error classes of this package; every message says what was found, what was expected and how to fix it."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

_T = TypeVar("_T")

__all__ = [
    "AdapterError",
    "BaseModelMismatchError",
    "ClusterError",
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
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


def warn_user(message: str) -> None:
    """Issue a `UserWarning` that points at the line of the user's code that called this package."""
    outermost = 1
    for level, (frame, _) in enumerate(traceback.walk_stack(sys._getframe(1)), start=2):
        if frame.f_code.co_filename.startswith(_PACKAGE):
            outermost = level  # frames of other libraries may lie between those of this package
    warnings.warn(message, UserWarning, stacklevel=outermost + 1)


class LoraEmbedError(Exception):
    """Base class of the errors of this package.

    Args:
        got: What was found, with the offending value.
        expected: What would have been accepted.
        hint: How to fix it, as a sentence or as code.
        problems: One line for each of several problems; the message shows the first twenty.
    """

    def __init__(self, got: str, expected: str, hint: str, problems: Sequence[str] = ()) -> None:
        super().__init__(got, expected, hint)
        self.got = got
        self.expected = expected
        self.hint = hint
        self.problems = list(problems)
        self.args = (got, expected, hint, self.problems)  # pickling passes these to __init__

    def __str__(self) -> str:
        lines = [f"got {self.got}; expected {self.expected}. {self.hint}"]
        lines += [f"  - {problem}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  - and {len(self.problems) - _SHOWN} more in the error's .problems")
        return "\n".join(lines)


class ConfigError(LoraEmbedError, ValueError):
    """Arguments are invalid; `.problems` has one line for each of them."""


def attempt(check: Callable[[], _T], errors: list[LoraEmbedError]) -> _T | None:
    """The result of a check; its error is added to `errors` instead of raised, so that others are found as well."""
    try:
        return check()
    except LoraEmbedError as error:
        errors.append(error)
        return None


def raise_together(errors: Sequence[LoraEmbedError]) -> None:
    """Raise one error as it is, and several as a ConfigError with the problems of all; nothing without any."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        listed = [line for error in errors for line in (error.problems or [str(error)])]
        raise ConfigError(f"{len(listed)} problem(s)", "arguments without any", "Correct them all:", listed)


class DatasetError(LoraEmbedError, ValueError):
    """A dataset cannot be used for training or evaluation; `.problems` names every offending id."""


class JournalError(LoraEmbedError):
    """A journal of LLM answers has another format, is in use, or cannot be written."""


class JournalInUseError(JournalError):
    """Another run is using the journal."""


class LLMError(LoraEmbedError):
    """An LLM returned no usable answer."""


class SplitError(LoraEmbedError, ValueError):
    """A corpus cannot be split into training and validation by source document."""


class ModelNotFoundError(LoraEmbedError, FileNotFoundError):
    """There is no loadable sentence-transformers or transformers model under a model id or path."""

    __str__ = LoraEmbedError.__str__  # OSError would print the first two arguments as an errno


class BaseModelMismatchError(LoraEmbedError):
    """The base model's weights differ from those that the adapter was trained on."""


class AdapterError(LoraEmbedError):
    """An adapter directory is damaged, incomplete, or does not fit its base model."""


class WrongIndexError(LoraEmbedError):
    """An index was built with another embedding model than the one that queries it."""


class UnsafeCheckpointError(AdapterError):
    """Weights are stored as a pickle, which can run code when it is loaded."""


class OutputDirectoryError(LoraEmbedError):
    """The output directory cannot be written, or writing to it would destroy other files."""


class ClusterError(LoraEmbedError):
    """There is no Ray cluster, it is too small, or its nodes do not have this package."""


class ExportError(LoraEmbedError):
    """A model cannot be exported, or the exported model deviates too much from it."""


class HubError(LoraEmbedError):
    """The Hugging Face Hub cannot be reached, or refuses a request."""


class NonFiniteLossError(LoraEmbedError):
    """A loss or an embedding is NaN or infinite."""


class DeviceMemoryError(LoraEmbedError):
    """A training step does not fit into the device's memory."""


class MissingExtraError(LoraEmbedError, ImportError):
    """An optional dependency is not installed; the message is the install command."""
