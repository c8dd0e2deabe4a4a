"""The files of a run that a report reads: its manifest and its log."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_index_lora_embed.config import MANIFEST_NAME
from llama_index_lora_embed.core.errors import AdapterError
from llama_index_lora_embed.core.files import read_json_lines
from llama_index_lora_embed.models.adapter_directory import Manifest


@dataclass(frozen=True)
class RunFacts:
    """What a report shows of a run in addition to its evaluations.

    Attributes:
        path: Adapter directory.
        manifest: Its `finetune.json`.
        log: Lines of `<path>.run/log.jsonl`; empty without that file.
        data: Lines of the run's `data_report`; empty if a dataset was passed, or if it is not known.
    """

    path: Path
    manifest: Manifest
    log: list[dict[str, Any]] = field(default_factory=list, repr=False)
    data: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, adapter_path: str | os.PathLike[str], data: str = "") -> RunFacts:
        """Read the facts of an adapter directory; `data` is the run's `data_report` as a string.

        Raises:
            AdapterError: The manifest is missing or damaged.
        """
        path = Path(adapter_path).expanduser().absolute()
        manifest = Manifest.read(path)
        if manifest is None:
            raise AdapterError(
                f"{str(path)!r} without {MANIFEST_NAME}",
                "an adapter directory written by this package",
                "Pass the model_output_path of a run.",
            )
        return cls(path, manifest, read_log(path.with_name(f"{path.name}.run") / "log.jsonl"), data.splitlines())

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> RunFacts | None:
        """The facts of an adapter directory; None where this package wrote none there.

        Raises:
            AdapterError: The manifest is damaged.
        """
        folder = Path(path).expanduser()
        return cls.read(folder) if (folder / MANIFEST_NAME).is_file() else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's log. Of steps that a resumed run repeated the last line counts; incomplete lines are skipped."""
    lines: list[dict[str, Any]] = []
    for value in read_json_lines(path) if path.exists() else ():
        if isinstance(value.get("step"), int):
            # a resumed run repeats some steps; a new run in the same directory starts at step 0
            while lines and lines[-1]["step"] > value["step"]:
                lines.pop()
            lines.append(value)
    return lines
