"""Checkpoints on disk: each whole or absent, verified before an older one goes, of one run's data and settings."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_pt_utils import safe_globals

from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError, warn_user
from llama_index_lora_embed.core.files import file_digest, replace_directory, staging_beside
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.checkpointing.selection import EVALUATIONS

logger = logging.getLogger(__name__)
CHECKPOINT_NAME = "checkpoint.json"
LOG_NAME = "log.jsonl"
LOCK_NAME = "lock"
_PICKLES = (".pt", ".pth")


def write_checkpoint(
    target: Path,
    write: Callable[[Path], None],
    settings: dict[str, Any],
    limit: int | None,
    found: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint aside, sync it, move it into place, read it back, then remove the oldest.

    Args:
        target: `<run directory>/checkpoint-<step>`.
        write: Puts the files into a folder of the target's name, somewhere else.
        settings: The run's data and settings, recorded for whoever resumes.
        limit: Whole checkpoints to keep; None or 0 keeps all.
        found: What the run found out by trying, and a resumed one should not try again.

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
        files = {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        record = {"step": step_of(target), "settings": settings, "found": found or {}, "files": files}
        record["digest"] = _digest(record)
        (folder / CHECKPOINT_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)  # the same step, from before a resume
        replace_directory(folder, target)
    if damage := find_damage(target):
        raise OSError(f"{target} was written but does not read back: {damage}")
    if limit:
        others = [path for path in reversed(checkpoints(target.parent)) if path != target]
        kept = [path for path in others if find_damage(path) is None][: limit - 1]
        for old in others:
            if old not in kept:
                shutil.rmtree(old)


def _digest(record: dict[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        if record["digest"] != _digest(record):
            return f"{CHECKPOINT_NAME} is changed"
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
        _cut_log(run_dir / LOG_NAME, checkpoint)
        return checkpoint, changed
    if resume:
        logger.warning("no checkpoint in %s to resume from; starting at step 0", run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if list(run_dir.rglob("checkpoint-*")):
        aside = run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        aside.mkdir()
        for path in list(run_dir.iterdir()):
            if path.name != LOCK_NAME:
                os.rename(path, aside / path.name)
        logger.warning("checkpoints of an earlier run were moved to %s", aside)
    elif (run_dir / LOG_NAME).exists():
        os.replace(run_dir / LOG_NAME, run_dir / f"previous.{LOG_NAME}")
    (run_dir / LOG_NAME).write_text("", encoding="utf-8")
    return None, set()


@contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Within it no other process can train into the same run directory.

    Raises:
        OutputDirectoryError: Another one does, or the directory cannot be made.
    """
    import filelock

    if not distributed.is_main():
        yield
        return
    made = [folder for folder in run_dir.parents if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / LOCK_NAME, timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise OutputDirectoryError(
            f"the run directory {str(run_dir)!r}, into which another process is training",
            "one training at a time for each model_output_path",
            "Wait for it, or choose another model_output_path.",
        ) from error
    except OSError as error:
        raise OutputDirectoryError(
            f"the run directory {str(run_dir)!r}, which cannot be written ({error})",
            "a place for the log and the checkpoints",
            "Move what is there, or choose another model_output_path.",
        ) from error
    try:
        yield
    finally:
        if [path.name for path in run_dir.iterdir()] == [LOCK_NAME]:  # an error before anything was trained
            shutil.rmtree(run_dir, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # something else is in it by now
                    folder.rmdir()
        lock.release()


def clear_checkpoints(run_dir: Path) -> None:
    """Remove a run's checkpoints and those of its rounds; the log stays."""
    for path in [*checkpoints(run_dir), *(p for p in run_dir.glob("round*") if p.is_dir())]:
        shutil.rmtree(path, ignore_errors=True)


def _cut_log(path: Path, checkpoint: Path) -> None:
    """Drop what was logged after the checkpoint; it comes again. A torn last line goes as well."""
    step = step_of(checkpoint)
    evaluated = {entry["step"] for entry in json.loads((checkpoint / EVALUATIONS).read_text())["history"]}
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            again = entry["step"] > step or "train_runtime" in entry
            judged = any(name.startswith("eval_") for name in entry)
            if not again and not (judged and entry["step"] not in evaluated):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_name(path.name + ".new")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
