"""Checkpoints on disk: written completely or not at all, and verified before an older one is removed."""

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
from transformers.trainer_pt_utils import safe_globals

from llama_index_lora_embed.config import LOCK_NAME
from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError, warn_user
from llama_index_lora_embed.core.files import (
    file_digest,
    read_json_lines,
    replace_directory,
    staging_beside,
    whole_file,
)
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.checkpointing.selection import EVALUATIONS

logger = logging.getLogger(__name__)
CHECKPOINT_NAME = "checkpoint.json"
LOG_NAME = "log.jsonl"
_PICKLES = (".pt", ".pth")
_FORMAT = 2  # of checkpoint.json and evaluations.json


def write_checkpoint(
    target: Path,
    write: Callable[[Path], None],
    run: dict[str, Any],
    limit: int | None,
    resolved: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint to a staging folder, sync it, move it into place, read it back, then remove the oldest.

    Args:
        target: `<run directory>/checkpoint-<step>`.
        write: Writes the files into a staging folder of the target's name.
        run: What decides the result of the run, compared when it is resumed.
        limit: Number of undamaged checkpoints to keep; None or 0 keeps all.
        resolved: What the run found by trying, such as the batch size that fits.

    Raises:
        OSError: The disk is full or not writable, or returns other bytes than were written; earlier checkpoints are
            unchanged.
        SafetensorError: The same, raised by safetensors.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging_beside(target) as staging:
        folder = staging / target.name
        folder.mkdir()
        write(folder)
        files = {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        record = {"format": _FORMAT, "step": step_of(target), "run": run, "resolved": resolved or {}, "files": files}
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
    """The checkpoints of a run, oldest first, damaged ones included."""
    return sorted((p for p in run_dir.glob("checkpoint-*") if step_of(p) >= 0), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 for any other name."""
    tail = checkpoint.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is damaged or unsafe; None if it is complete and its pickles hold plain data only."""
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
                # transformers loads them in the same way; here a pickle that runs code is refused before
                with safe_globals():  # type: ignore[no-untyped-call]
                    torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    except (RuntimeError, pickle.UnpicklingError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def read_record(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's own record: step, run, digests of files."""
    record: dict[str, Any] = json.loads((checkpoint / CHECKPOINT_NAME).read_text(encoding="utf-8"))
    return record


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, or None; warns of damaged ones."""
    for path in reversed(checkpoints(run_dir)):
        damage = find_damage(path)
        if damage is None:
            return path
        warn_user(f"Checkpoint {str(path)!r} is damaged and skipped: {damage}.")
    return None


def open_run(
    run_dir: Path,
    run: dict[str, Any],
    resume: bool | str,
    allow_changes: Collection[str] = (),
    measured: Collection[str] = (),
) -> tuple[Path | None, set[str]]:
    """Prepare a run directory: choose the checkpoint to resume from, or move the files of an older run aside.

    `run` holds what decides the result of this run, by name; `allow_changes` names what may differ from the checkpoint,
    `measured` what was found by measuring, so that a checkpoint's value takes the place of this run's.
    `resume` is True for the newest checkpoint, or the path of one; in the run directories of other mining rounds than
    that checkpoint's, the newest is taken.

    Returns:
        The checkpoint, or None to start at step 0; and the names that differ.

    Raises:
        ConfigError: The checkpoint is of another run or format, or it was named and is damaged; or `allow_changes` has
            an unknown name.
    """
    if unknown := sorted(set(allow_changes) - run.keys()):
        raise ConfigError(
            f"allow_changes with {', '.join(map(repr, unknown))}",
            f"names that a checkpoint records: {', '.join(sorted(run))}",
            "Correct them.",
        )
    checkpoint = _checkpoint_to_resume(run_dir, resume)
    if checkpoint is not None:
        record = read_record(checkpoint)
        if record.get("format") != _FORMAT:
            raise ConfigError(
                f"checkpoint {str(checkpoint)!r} of format {record.get('format', 1)}",
                f"format {_FORMAT}, which this version of the package writes",
                "Resume with the version that wrote it, or start without resume_from_checkpoint.",
            )
        then = record["run"]
        run.update({name: then[name] for name in measured if name in then})
        changed = {name for name in then.keys() | run.keys() if then.get(name) != run.get(name)}
        if refused := sorted(changed - set(allow_changes)):
            raise ConfigError(
                f"a checkpoint of another run in {str(run_dir)!r}",
                "the same data and settings",
                f"Restore them, allow them with allow_changes={refused}, or start without resume_from_checkpoint. "
                "Differences:",
                [f"{name}: {then.get(name)!r} then, {run.get(name)!r} now" for name in refused],
            )
        logger.info("resuming from %s", checkpoint)
        _trim_log(run_dir / LOG_NAME, checkpoint)
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


def _checkpoint_to_resume(run_dir: Path, resume: bool | str) -> Path | None:
    named = None if isinstance(resume, bool) else Path(resume).expanduser().resolve()
    if named is None or named.parent != run_dir.resolve():
        return latest_checkpoint(run_dir) if resume else None
    if damage := find_damage(named):
        raise ConfigError(
            f"resume_from_checkpoint={resume!r}, which is damaged: {damage}",
            "a complete checkpoint",
            "resume_from_checkpoint=True takes the newest that is.",
        )
    return named


@contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Within it no other process can train into the same run directory.

    Raises:
        OutputDirectoryError: Another process is training into it, or it cannot be created.
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
            "a folder for the log and the checkpoints",
            "Choose another model_output_path, or make this one writable.",
        ) from error
    try:
        yield
    finally:
        if [path.name for path in run_dir.iterdir()] == [LOCK_NAME]:  # an error came before the first step
            shutil.rmtree(run_dir, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # it has other contents by now
                    folder.rmdir()
        lock.release()


def clear_checkpoints(run_dir: Path) -> None:
    """Remove the checkpoints of a run, and the folders of its later mining rounds; the log is kept."""
    for path in [*checkpoints(run_dir), *(p for p in run_dir.glob("round*") if p.is_dir())]:
        shutil.rmtree(path, ignore_errors=True)


def _trim_log(path: Path, checkpoint: Path) -> None:
    """Remove what was logged after the checkpoint, which will be logged again, and a line that was cut short."""
    step = step_of(checkpoint)
    evaluated = {entry["step"] for entry in json.loads((checkpoint / EVALUATIONS).read_text())["history"]}
    entries = read_json_lines(path) if path.exists() else []
    with whole_file(path) as file:
        for entry in entries:
            evaluation = any(name.startswith("eval_") for name in entry)
            later = entry["step"] > step or "train_runtime" in entry
            if not later and not (evaluation and entry["step"] not in evaluated):
                file.write(json.dumps(entry) + "\n")
