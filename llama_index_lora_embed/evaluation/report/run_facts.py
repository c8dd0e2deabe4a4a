"""What is on disk of a run: its manifest and its log."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_index_lora_embed.config import MANIFEST_NAME
from llama_index_lora_embed.core.errors import AdapterError
from llama_index_lora_embed.models.adapter_directory import Manifest

_LOG = "log.jsonl"


@dataclass(frozen=True)
class RunFacts:
    """What a report says of a run beside its evaluations.

    Attributes:
        path: Adapter directory.
        manifest: Its `finetune.json`.
        log: Lines of `<path>.run/log.jsonl`; empty if there is none any more.
        data: What became of the nodes, a line each; empty if a dataset was passed, or if it is not known.
    """

    path: Path
    manifest: Manifest
    log: list[dict[str, Any]] = field(default_factory=list, repr=False)
    data: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, adapter_path: str | os.PathLike[str], data: str = "") -> RunFacts:
        """The facts of an adapter directory that this package wrote.

        Args:
            adapter_path: The directory.
            data: The run's `data_report` in words.

        Raises:
            AdapterError: There is no manifest, or a damaged one.
        """
        path = Path(adapter_path).expanduser().absolute()
        manifest = Manifest.read(path)
        if manifest is None:
            raise AdapterError(
                f"{str(path)!r} without a {MANIFEST_NAME}",
                "an adapter directory that this package wrote",
                "Pass the model_output_path of a run.",
            )
        return cls(path, manifest, read_log(path.with_name(path.name + ".run") / _LOG), data.splitlines())


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's log; what a resumed run went over again counts once, a line that was cut short not at all."""
    lines: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            # a run that was resumed goes over some steps again; a new one in the same place begins at 0
            lines = [kept for kept in lines if kept["step"] <= value["step"]]
            lines.append(value)
    return lines
