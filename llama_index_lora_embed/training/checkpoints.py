"""Checkpoints on disk: each whole or absent, verified before an older one goes, of one run's data and settings."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_pt_utils import safe_globals

from llama_index_lora_embed.adapter import file_digest, replace_directory, staging_beside
from llama_index_lora_embed.errors import ConfigError, warn_user

logger = logging.getLogger(__name__)
CHECKPOINT_NAME = "checkpoint.json"
LOG_NAME = "log.jsonl"
_PICKLES = (".pt", ".pth")


def write_checkpoint(target: Path, write: Callable[[Path], None], settings: dict[str, Any], limit: int | None) -> None:
    """Write a checkpoint aside, sync it, move it into place, read it back, then remove the oldest.

    Args:
        target: `<run directory>/checkpoint-<step>`.
        write: Puts the files into a folder of the target's name, somewhere else.
        settings: The run's data and settings, recorded for whoever resumes.
        limit: Checkpoints to keep; None or 0 keeps all.

    Raises:
        OSError: The disk is full or not writable, or gives back other bytes than were written; what was there
            before is unchanged.
        SafetensorError: The same, from the weights' own writer.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging_beside(target) as staging:
        folder = staging / target.name
        folder.mkdir()
        write(folder)
        files = {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.is_file()}
        record = {"step": step_of(target), "settings": settings, "files": files}
        (folder / CHECKPOINT_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)  # the same step, from before a resume
        replace_directory(folder, target)
    if damage := find_damage(target):
        raise OSError(f"{target} was written but does not read back: {damage}")
    kept = [path for path in checkpoints(target.parent) if path != target]
    for old in kept[: len(kept) + 1 - limit] if limit else []:
        shutil.rmtree(old)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    return sorted((p for p in run_dir.glob("checkpoint-*") if step_of(p) >= 0), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells; -1 for another name."""
    tail = checkpoint.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole and holds nothing but plain data."""
    try:
        record = read_record(checkpoint)
        for name, digest in record["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if file_digest(path) != digest:
                return f"{name} is changed or cut short"
            if path.suffix in _PICKLES:
                # transformers loads them in the same way; what would run code is refused here already
                with safe_globals():  # type: ignore[no-untyped-call]
                    torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    except (RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def read_record(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's own account of itself: step, settings, digests.

    Raises:
        OSError: There is none.
        ValueError: It is no JSON.
    """
    record: dict[str, Any] = json.loads((checkpoint / CHECKPOINT_NAME).read_text(encoding="utf-8"))
    return record


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; damaged ones are passed over, and said."""
    for path in reversed(checkpoints(run_dir)):
        damage = find_damage(path)
        if damage is None:
            return path
        warn_user(f"Checkpoint {str(path)!r} is damaged and passed over: {damage}.")
    return None


def open_run(
    run_dir: Path, settings: dict[str, Any], resume: bool, allow_changes: Collection[str] = ()
) -> tuple[Path | None, set[str]]:
    """Make a run directory ready: choose the checkpoint to resume from, or put an older run's aside.

    Args:
        run_dir: `<model_output_path>.run`.
        settings: This run's data and settings.
        resume: Whether to resume.
        allow_changes: Names of settings that may differ from the checkpoint's.

    Returns:
        The checkpoint, or None to start at step 0; and the names that differ.

    Raises:
        ConfigError: The checkpoint belongs to other data or settings; or `allow_changes` has an unknown name.
    """
    if unknown := sorted(set(allow_changes) - settings.keys()):
        raise ConfigError(
            f"allow_changes with {', '.join(map(repr, unknown))}",
            f"names of what a checkpoint records: {', '.join(sorted(settings))}",
            "Correct them.",
        )
    checkpoint = latest_checkpoint(run_dir) if resume else None
    if checkpoint is not None:
        recorded = read_record(checkpoint)["settings"]
        changed = {n for n in recorded.keys() | settings.keys() if recorded.get(n) != settings.get(n)}
        if refused := sorted(changed - set(allow_changes)):
            raise ConfigError(
                f"a checkpoint of another run in {str(run_dir)!r}",
                "the same data and settings",
                f"Restore them, allow them with allow_changes={refused}, or start without resume_from_checkpoint. "
                "Differences:",
                [f"{name}: {recorded.get(name)!r} then, {settings.get(name)!r} now" for name in refused],
            )
        logger.info("resuming from %s", checkpoint)
        _cut_log(run_dir / LOG_NAME, step_of(checkpoint))
        return checkpoint, changed
    if resume:
        logger.warning("no checkpoint in %s to resume from; starting at step 0", run_dir)
    if checkpoints(run_dir):
        aside = run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        os.rename(run_dir, aside)
        logger.warning("checkpoints of an earlier run were moved to %s", aside)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / LOG_NAME).write_text("", encoding="utf-8")
    return None, set()


def _cut_log(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint; those steps are taken again. A torn last line goes as well."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_name(path.name + ".new")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
