"""Several processes that train one model (torchrun, accelerate launch): ranks, broadcasts, work of the main process.

accelerate starts the processes' group. Its helpers are not used for the rest, because they settle the device of a
single process, too, as soon as they are called.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llama_index_lora_embed.core.errors import LoraEmbedError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together; 1 without a launcher."""
    return dist.get_world_size() if _running() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _running() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the main process, which evaluates, writes files and logs."""
    return rank() == 0


def own_device(device: str | None) -> str | None:
    """The device of this process: the user's choice, or a GPU of its own if there are several processes.

    Without a choice, sentence-transformers would put all processes on one GPU.
    """
    if device is None and world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device


def join(device: str | None) -> None:
    """Join the other processes, if there are any: with NCCL between GPUs, gloo between CPUs."""
    if world_size() > 1 and not _running():
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def share(value: T | None) -> T:
    """The main process's value, in every process (broadcast)."""
    if not _running() or dist.get_world_size() == 1:
        return value  # type: ignore[return-value]
    held: list[Any] = [value if is_main() else None]
    dist.broadcast_object_list(held, src=0)
    result: T = held[0]
    return result


def on_main(work: Callable[[], T]) -> T:
    """Run a function in the main process alone; return its result, or raise its error, in every process.

    Raises:
        LoraEmbedError: What the function raised.
    """
    if not _running() or dist.get_world_size() == 1:
        return work()
    result: T | None = None
    error: LoraEmbedError | None = None
    if is_main():
        try:
            result = work()
        except LoraEmbedError as raised:
            error = raised
    result, error = share((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def highest(number: int) -> int:
    """The highest number of any process, in every process."""
    if not _running() or dist.get_world_size() == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    held = torch.tensor(number, device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held)


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
