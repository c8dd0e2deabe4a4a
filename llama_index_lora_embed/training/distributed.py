"""Several processes that train one model (torchrun, accelerate launch): who is who, and what only one does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llama_index_lora_embed.core.errors import LoraEmbedError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together; 1 where none were launched."""
    return dist.get_world_size() if _running() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _running() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that evaluates, writes and speaks."""
    return rank() == 0


def own_device(device: str | None) -> str | None:
    """The device of this process: the one asked for, or its own GPU where several processes were launched.

    Args:
        device: The user's choice; None leaves it to sentence-transformers, which would put all processes on one GPU.
    """
    if device is None and world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device


def join(device: str | None) -> None:
    """Join the other processes, if there are any: NCCL between GPUs, gloo between processors."""
    if world_size() > 1 and not _running():
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def share(value: T | None) -> T:
    """The main process's value, in every process."""
    if not _running() or dist.get_world_size() == 1:
        return value  # type: ignore[return-value]
    held: list[Any] = [value if is_main() else None]
    dist.broadcast_object_list(held, src=0)
    result: T = held[0]
    return result


def on_main(work: Callable[[], T]) -> T:
    """Do something in the main process alone and give every process its result, or raise its error everywhere.

    Raises:
        LoraEmbedError: What the work raised.
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
    """The highest number that any process has; the same answer in all."""
    if not _running() or dist.get_world_size() == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    held = torch.tensor(number, device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held)


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
