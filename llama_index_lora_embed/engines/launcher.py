"""Launchers: a run in other processes. Here those of this machine, which torchrun or accelerate starts."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.errors import ConfigError, LoraEmbedError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llama_index_lora_embed.engines.result import FinetuneResult
    from llama_index_lora_embed.engines.run import FinetuneRun

ORDER, RESULT, ERROR = "order", "result", "error"
"""Names of the files between the launcher and its processes."""
_POLL_S = 0.1
_SHUTDOWN_S = 600  # a step, and what the others wait for: an evaluation, a checkpoint


class Launcher(Protocol):
    """Trains a run in other processes."""

    def launch(
        self, run: FinetuneRun, callbacks: Sequence[TrainerCallback], train_kwargs: dict[str, Any]
    ) -> FinetuneResult:
        """Train a checked run and write its adapter directory; `callbacks` are called in the other processes."""


@dataclass(frozen=True)
class Order:
    """What a launcher sends to its processes.

    Attributes:
        run: A checked run with its data.
        callbacks: transformers' callbacks.
        train_kwargs: More training arguments.
    """

    run: FinetuneRun
    callbacks: tuple[TrainerCallback, ...]
    train_kwargs: dict[str, Any]

    def pack(self, pickler: type[pickle.Pickler] = pickle.Pickler) -> bytes:
        """As bytes, by `pickler`.

        Raises:
            ConfigError: Some objects cannot be sent; all of them are named.
        """
        run = self.run
        objects = {"loss": run.loss, "teacher": run.teacher, "lora_config": run.lora_config, **self.train_kwargs}
        objects |= {f"callbacks[{index}]": callback for index, callback in enumerate(self.callbacks)}
        problems = []
        for name, value in objects.items():
            try:
                _pickled(value, pickler)
            except Exception as error:
                problems.append(f"{name}={value!r:.80}: {error}")
        if problems:
            raise ConfigError(
                f"{len(problems)} object(s) that cannot be sent to another process",
                "functions and classes of modules that every process can import, and objects of plain values",
                "Name a teacher by its folder or Hub id, give a loss as a function that makes it from the model, and "
                "open files and connections where they are used:",
                problems,
            )
        return _pickled(self, pickler)


def _pickled(value: Any, pickler: type[pickle.Pickler]) -> bytes:
    import torch

    class Travelling(pickler):  # type: ignore[misc, valid-type]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, torch.nn.Module):
                raise pickle.PicklingError(f"a live model ({type(value).__name__})")
            inherited = getattr(super(), "reducer_override", None)  # cloudpickle's, which sends code
            if inherited is not None:
                return inherited(value)
            if getattr(value, "__module__", "") == "__main__" and hasattr(value, "__qualname__"):
                raise pickle.PicklingError(f"{value.__qualname__} of the program itself, which others cannot import")
            return NotImplemented

    buffer = io.BytesIO()
    Travelling(buffer).dump(value)
    return buffer.getvalue()


@dataclass(frozen=True)
class ProcessLauncher:
    """Several processes of this machine train one model, over NCCL between GPUs and gloo between processors.

    Each process takes `batch_size` passages, and all passages of all processes are negatives of each other. Ctrl-C and
    SIGTERM save a checkpoint, as in one process.

    Attributes:
        num_workers: Number of processes, one for each GPU; None for the number of GPUs, or 1 without any.
        program: What starts them.
        max_failures: How many times all are started again after one was lost, from the last checkpoint; this switches
            checkpoints on.

    Example:
        >>> run_finetune(config, launcher=ProcessLauncher(num_workers=2))  # doctest: +SKIP
    """

    num_workers: int | None = None
    program: Literal["torchrun", "accelerate"] = "torchrun"
    max_failures: int = 0

    def __post_init__(self) -> None:
        check_numbers(
            num_workers=(1 if self.num_workers is None else self.num_workers, 1), max_failures=(self.max_failures, 0)
        )
        if self.program not in ("torchrun", "accelerate"):
            raise ConfigError(f"program={self.program!r}", "'torchrun' or 'accelerate'", "Choose one of them.")

    def launch(
        self, run: FinetuneRun, callbacks: Sequence[TrainerCallback], train_kwargs: dict[str, Any]
    ) -> FinetuneResult:
        """See `Launcher`.

        Raises:
            ConfigError: Objects cannot be sent to another process.
            KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
            LoraEmbedError: What a process raised, or that one was lost.
        """
        from llama_index_lora_embed.training.checkpointing.checkpoints import clear_checkpoints
        from llama_index_lora_embed.training.checkpointing.signals import StopRequest

        wanted = run.config.training.save_checkpoints
        if self.max_failures:
            run = with_settings(run, training={"save_checkpoints": True})
        order = Order(run, tuple(callbacks), train_kwargs).pack()
        with tempfile.TemporaryDirectory(prefix="lora-embed-") as name:
            folder = Path(name)
            (folder / ORDER).write_bytes(order)
            with StopRequest() as stop:
                code = self._run(folder, stop)
            stop.deliver()
            for file in sorted(folder.glob(f"{ERROR}-*")):
                raise pickle.loads(file.read_bytes())
            if not (folder / RESULT).exists():
                raise LoraEmbedError(
                    f"exit code {code} of {self.program}",
                    "processes that train to the end",
                    "What they wrote to standard error says why; max_failures= starts them again.",
                )
            result: FinetuneResult = pickle.loads((folder / RESULT).read_bytes())
        if self.max_failures and not wanted:
            clear_checkpoints(Path(f"{result.adapter_path}.run"))
        return result

    def _run(self, folder: Path, stop: Any) -> int:
        """Exit code of the processes; a signal that `stop` records is passed on."""
        path = os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))
        command = [
            sys.executable,
            "-m",
            *self._arguments(),
            "-m",
            "llama_index_lora_embed.engines.launched",
            str(folder),
        ]
        env = {**os.environ, "PYTHONPATH": path}
        # torch keeps one store for all tries, in which a new process may find the address of a dead one and wait for it
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        told = False
        # a session of its own: the terminal sends Ctrl-C to a whole group, and a second signal would stop at once
        process = subprocess.Popen(command, env=env, stdout=2, start_new_session=True)
        try:
            while process.poll() is None:
                if stop.signal is not None and not told:
                    told = True
                    process.send_signal(stop.signal)
                time.sleep(_POLL_S)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        return process.returncode

    def _arguments(self) -> Iterator[str]:
        import torch

        workers = self.num_workers or max(1, torch.cuda.device_count())
        if self.program == "torchrun":
            yield from ("torch.distributed.run", "--standalone", f"--nproc-per-node={workers}")
            yield from (f"--max-restarts={self.max_failures}", f"--shutdown-timeout={_SHUTDOWN_S}")
        else:
            yield from ("accelerate.commands.launch", f"--num_processes={workers}", "--main_process_port=0")
            yield f"--max_restarts={self.max_failures}"
            if workers > 1:  # accelerate's name for several processes of one machine, with GPUs or without
                yield "--multi_gpu"


def with_settings(run: FinetuneRun, **groups: dict[str, Any]) -> FinetuneRun:
    """A run with other values for some fields of its configuration: `with_settings(run, output={...})`."""
    changed = {name: getattr(run.config, name).replace(**values) for name, values in groups.items()}
    return replace(run, config=run.config.replace(**changed))


def check_numbers(**numbers: tuple[Any, int]) -> None:
    """Raise a ConfigError unless each is a whole number of at least its minimum."""
    problems = [
        f"{name}={value!r}: expected a whole number of at least {least}"
        for name, (value, least) in numbers.items()
        if not is_int(value, least)
    ]
    if problems:
        raise ConfigError(f"{len(problems)} wrong number(s)", "the numbers named below", "Correct them:", problems)
