"""`RayLauncher`: a run on the workers of a Ray cluster, by Ray Train's TorchTrainer (V2).

Between nodes everything goes through the storage: workers train into a folder of their node, report it with each
checkpoint, and start from the last reported one after a failure.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import ray
import ray.train

from llama_index_lora_embed.core.errors import ClusterError, ConfigError, LoraEmbedError
from llama_index_lora_embed.core.files import replace_directory, staging_beside
from llama_index_lora_embed.distributed.cluster import check_resources, check_storage, check_workers, connect
from llama_index_lora_embed.engines.launcher import Order, check_numbers, with_settings

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llama_index_lora_embed.engines.result import FinetuneResult
    from llama_index_lora_embed.engines.run import FinetuneRun

_ADAPTER = "adapter"  # the adapter directory's name in the workers' folder and in a checkpoint
_PROGRESS_S = 1.0
_TIMEOUT_S = 86_400  # an evaluation, for which the other workers wait; Ray notices lost workers by itself


@dataclass(frozen=True)
class RayLauncher:
    """Workers of a Ray cluster train one model together; a lost worker costs the steps since the last checkpoint.

    Data is read, generated and checked by the caller's process, and the adapter directory is written there. Each worker
    takes `batch_size` passages, and all passages of all workers are negatives of each other. With the same number of
    workers, the weights are those of an undisturbed run, bit for bit. Checkpoints are written every
    `config.training.checkpoint_save_steps` steps; unless `save_checkpoints` is set, they are removed at the end.

    Where the caller's process is killed, the same call with `resume_from_checkpoint=True` goes on from the last
    checkpoint in the storage.

    Attributes:
        num_workers: Number of workers.
        use_gpu: One GPU for each worker, over NCCL; otherwise processors, over gloo.
        resources_per_worker: What a worker takes, by Ray's names; None for one CPU, and one GPU with `use_gpu`.
        storage_path: Folder that all nodes share, or a place that fsspec knows ("s3://bucket/runs"); None for the
            folder of `model_output_path`.
        name: Of the run's folder in the storage; None for the name of `model_output_path` and a digest of its path. A
            new run gets a number at the end where there is one already.
        max_failures: How many times training starts again from the last checkpoint after a worker was lost.
        address: Of the cluster, see `connect`.
        show: Called in the caller's process with each line of progress.

    Example:
        >>> run_finetune(config, launcher=RayLauncher(num_workers=4, use_gpu=True))  # doctest: +SKIP
    """

    num_workers: int = 1
    use_gpu: bool = False
    resources_per_worker: Mapping[str, float] | None = None
    storage_path: str | os.PathLike[str] | None = None
    name: str | None = None
    max_failures: int = 3
    address: str | None = None
    show: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        check_numbers(num_workers=(self.num_workers, 1), max_failures=(self.max_failures, 0))

    def launch(
        self, run: FinetuneRun, callbacks: Sequence[TrainerCallback], train_kwargs: dict[str, Any]
    ) -> FinetuneResult:
        """See `engines.launcher.Launcher`.

        Raises:
            ConfigError: Objects cannot be sent to workers; or a checkpoint is named that is not in the storage.
            ClusterError: There is no cluster, it is too small, its nodes lack this package, or training failed.
            OutputDirectoryError: The storage cannot be written by all.
            KeyboardInterrupt: Ctrl-C; the last checkpoint is kept.
            LoraEmbedError: What a worker raised.
        """
        from llama_index_lora_embed.models.adapter_directory import check_output
        from llama_index_lora_embed.training.checkpointing.checkpoints import only_run

        output = run.config.output
        if not isinstance(output.resume_from_checkpoint, bool):
            raise ConfigError(
                f"resume_from_checkpoint={output.resume_from_checkpoint!r} with a RayLauncher",
                "True for the last checkpoint in the storage, or False",
                "Name the run's folder in the storage by RayLauncher(storage_path=, name=).",
            )
        target = check_output(output.model_output_path)
        order = Order(run, tuple(callbacks), train_kwargs).pack(ray.cloudpickle.Pickler)
        storage = os.fspath(self.storage_path or target.parent)
        if storage.startswith("memory:"):
            raise ConfigError(
                f"storage_path={storage!r}, the memory of one process",
                "a folder or an object store that all nodes see",
                "Take a shared folder, or s3://bucket/folder.",
            )
        connect(self.address)
        check_resources(self.num_workers, self._resources())
        check_workers()
        check_storage(storage)
        with only_run(target.with_name(f"{target.name}.run")):
            digest = hashlib.sha256(str(target).encode()).hexdigest()[:8]
            name = self.name or f"{target.name}.ray-{digest}"
            place = _Place.of(storage, name, resume=output.resume_from_checkpoint)
            with _interrupts(), self._mailbox() as mailbox:
                fitted = self._fit(place, run, partial(_train, order, mailbox))
            result: FinetuneResult | LoraEmbedError = fitted.return_value
            if isinstance(result, LoraEmbedError):
                raise result
            _take_over(fitted.checkpoint, target)
            if run.config.training.save_checkpoints:
                place.tidy(Path(checkpoint.path).name for checkpoint, _ in fitted.best_checkpoints)
            else:
                place.remove()
        return replace(result, adapter_path=str(target))

    def _resources(self) -> dict[str, float]:
        return {"CPU": 1, **({"GPU": 1} if self.use_gpu else {}), **(self.resources_per_worker or {})}

    def _fit(self, place: _Place, run: FinetuneRun, train: Callable[[], Any]) -> Any:
        from ray.train.torch import TorchConfig, TorchTrainer

        settings = run.config.training
        keep = (settings.checkpoint_save_total_limit or None) if settings.save_checkpoints else 1
        backend = "cpu:gloo,cuda:nccl" if self.use_gpu else "gloo"
        trainer = TorchTrainer(
            train,
            torch_config=TorchConfig(backend=backend, timeout_s=_TIMEOUT_S),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.num_workers, use_gpu=self.use_gpu, resources_per_worker=self._resources()
            ),
            run_config=ray.train.RunConfig(
                name=place.name,
                storage_path=place.folder,
                storage_filesystem=place.for_ray(),
                failure_config=ray.train.FailureConfig(max_failures=self.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=keep),
            ),
        )
        try:
            return trainer.fit()
        except ray.train.TrainingFailedError as error:
            for failure in getattr(error, "worker_failures", {}).values():
                if isinstance(failure, LoraEmbedError):
                    raise failure from error
            raise ClusterError(
                f"a training that failed more than {self.max_failures} time(s); the last time: {error}",
                "workers that train to the end",
                f"Checkpoints are in {str(place)!r}: resume_from_checkpoint=True goes on from the last one. Often "
                "too little memory is the cause.",
            ) from error

    @contextmanager
    def _mailbox(self) -> Iterator[Any]:
        """An actor to which workers tell progress and errors; lines of progress are shown within the block."""
        mailbox: Any = ray.remote(num_cpus=0)(_Mailbox).remote()
        ended = threading.Event()

        def show() -> None:
            while True:
                last = ended.wait(_PROGRESS_S)
                for line in ray.get(mailbox.take_lines.remote()):
                    if self.show is not None:
                        self.show(line)
                if last:
                    return

        thread = threading.Thread(target=show, name="progress", daemon=True)
        thread.start()
        try:
            yield mailbox
        finally:
            ended.set()
            thread.join(timeout=10)
            ray.kill(mailbox)


@dataclass(frozen=True)
class _Place:
    """The folder of a run in the storage, `<folder>/<name>` on a file system of fsspec."""

    fs: Any
    folder: str
    name: str
    local: bool

    @classmethod
    def of(cls, storage: str, name: str, *, resume: bool) -> _Place:
        """The last run of this name, or with `resume=False` a new one with the next free number."""
        local = "://" not in storage
        # a listing that is kept would hide what the workers write
        fs, folder = fsspec.core.url_to_fs(os.path.abspath(os.path.expanduser(storage)) if local else storage,
                                           use_listings_cache=False)  # fmt: skip
        names = [name]
        while fs.exists(f"{folder}/{names[-1]}"):
            names.append(f"{name}-{len(names) + 1}")
        return cls(fs, folder, names[-2] if resume and names[1:] else names[-1], local)

    def for_ray(self) -> Any:
        """The file system for Ray; None for a local one."""
        if self.local:
            return None
        import pyarrow.fs

        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self.fs))

    def tidy(self, kept: Iterable[str]) -> None:
        """Remove the checkpoints that were written when a worker died, of which Ray does not know."""
        names = set(kept)
        for entry in self.fs.ls(f"{self.folder}/{self.name}", detail=True):
            name = Path(entry["name"]).name
            if entry["type"] == "directory" and name.startswith("checkpoint_") and name not in names:
                self.fs.rm(entry["name"], recursive=True)

    def remove(self) -> None:
        """Remove all of it."""
        self.fs.rm(f"{self.folder}/{self.name}", recursive=True)

    def __str__(self) -> str:
        return (
            self.fs.unstrip_protocol(f"{self.folder}/{self.name}") if not self.local else f"{self.folder}/{self.name}"
        )


class _Mailbox:
    """What workers have to say; an actor."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.error: LoraEmbedError | None = None

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def take_lines(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def put_error(self, error: LoraEmbedError) -> None:
        self.error = error

    def get_error(self) -> LoraEmbedError | None:
        return self.error


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ray's handler of Ctrl-C exits the program and stays in place; within the block it raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _take_over(checkpoint: Any, target: Path) -> None:
    """Write the adapter directory and the logs of a run's last checkpoint to where the user wants them."""
    with staging_beside(target) as staging:
        folder = staging / "run"
        checkpoint.to_directory(folder)
        for path in folder.rglob("*.jsonl"):
            place = target.parent / path.relative_to(folder).as_posix().replace(_ADAPTER, target.name, 1)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        replace_directory(folder / _ADAPTER, target)


def _train(order: bytes, mailbox: Any) -> FinetuneResult | LoraEmbedError:
    """What each worker does, and does again after a failure; the result, or the error that would come again."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from llama_index_lora_embed.training.callbacks import ProgressLines

    error: LoraEmbedError | None = ray.get(mailbox.get_error.remote())
    if error is not None:
        return error
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    context, checkpoint = ray.train.get_context(), ray.train.get_checkpoint()
    unpacked: Order = ray.cloudpickle.loads(order)
    folder = Path.cwd() / ".lora-embed"  # in Ray's folder of the session, at the same place on all nodes
    try:
        if context.get_local_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier try
            folder.mkdir(parents=True)
            if checkpoint is not None:
                checkpoint.to_directory(folder)
                shutil.rmtree(folder / _ADAPTER, ignore_errors=True)
        dist.barrier()
        run = with_settings(
            unpacked.run,
            output={"model_output_path": str(folder / _ADAPTER), "resume_from_checkpoint": checkpoint is not None},
            training={"save_checkpoints": True, "checkpoint_save_total_limit": 1, "show_progress_bar": False},
        )
        lines = ProgressLines(lambda line: mailbox.tell.remote(line))
        result = run.execute([lines, _reporter(folder), *unpacked.callbacks], unpacked.train_kwargs, warn=False)
        _report(folder, result.steps)
        return result
    except LoraEmbedError as raised:
        ray.get(mailbox.put_error.remote(raised))
        raise
    finally:
        if context.get_local_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _report(folder: Path, step: int) -> None:
    main = ray.train.get_context().get_world_rank() == 0
    ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder) if main else None)


def _reporter(folder: Path) -> TrainerCallback:
    """A callback that puts the workers' folder into the storage with each checkpoint."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _report(folder, state.global_step)

    return Reporter()
