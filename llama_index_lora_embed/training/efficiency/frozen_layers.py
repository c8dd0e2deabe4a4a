"""The frozen layers below the first adapted one: their outputs are the same in every epoch, so they are kept."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llama_index_lora_embed.core.errors import warn_user

logger = logging.getLogger(__name__)
TEXT_IDS = "text_ids"
"""Key in a chunk of token tensors: which text each row is, int [rows]."""
_LEFT_FREE = 1 << 30  # bytes of a disk that are not ours to fill


def text_id(task: str, text: str, window: int = 0) -> int:
    """A number for a text's window under a prompt, the same in every process; 63 bits of a digest."""
    digest = hashlib.blake2b(f"{task}\0{window}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _CapturedError(Exception):
    """Leaves a forward pass as soon as what is wanted is there."""


class HiddenStates:
    """Rows of vectors by number, in memory up to a bound and in a temporary file beyond it, while its disk has room.

    Args:
        memory: Bytes to hold in memory.
        folder: Where the file may be; None for the system's own folder.
    """

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        self.memory = self.left = memory
        self.folder = folder
        self.full = False
        self.held: dict[int, Tensor] = {}
        self.places: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self.file: Any = None

    def put(self, number: int, rows: Tensor) -> None:
        """Keep [tokens, width] under a number, if there is room for it."""
        size = rows.numel() * rows.element_size()
        if size <= self.left:
            self.left -= size
            self.held[number] = rows.clone()
        elif not self.full:
            try:
                self._write(number, rows, size)
            except OSError as error:
                self.full = True
                warn_user(
                    f"Outputs of frozen layers are kept for {len(self.held) + len(self.places)} texts, with no room "
                    f"for more ({error}). Training goes on and computes the others in each epoch. "
                    "frozen_cache_mb is how much memory they may take."
                )

    def _write(self, number: int, rows: Tensor, size: int) -> None:
        if self.file is None:
            # unbuffered, so that a full disk shows here; closed with the object
            self.file = tempfile.TemporaryFile(prefix="hidden-states-", dir=self.folder, buffering=0)  # noqa: SIM115
        if shutil.disk_usage(self.folder or tempfile.gettempdir()).free < size + _LEFT_FREE:
            raise OSError(f"less than {_LEFT_FREE >> 20} MB would be left free on the disk")
        place = self.file.seek(0, os.SEEK_END)
        if self.file.write(rows.contiguous().view(torch.uint8).numpy().tobytes()) != size:
            raise OSError("the disk took less than was written")
        self.places[number] = (place, rows.shape, rows.dtype)

    def get(self, number: int) -> Tensor | None:
        """What was put there; None if there was no room."""
        if number not in self.places:
            return self.held.get(number)
        place, shape, dtype = self.places[number]
        size = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
        self.file.seek(place)
        return torch.frombuffer(bytearray(self.file.read(size)), dtype=dtype).view(shape)

    def close(self) -> None:
        """Forget everything; there is as much room as before."""
        self.held, self.places = {}, {}
        self.left, self.full = self.memory, False
        if self.file is not None:
            self.file.close()
            self.file = None


def _row(value: Any, row: int, mask: Tensor) -> Any:
    """One row of a feature, without its padding; what is no tensor holds for all rows."""
    if not isinstance(value, Tensor):
        return value
    return value[row : row + 1][:, mask[row]] if value.shape == mask.shape else value[row : row + 1]


class HiddenStateCache:
    """Runs a model from its first adapted layer on, with the outputs of the layers below from the time before.

    Args:
        layers: The transformer's layers.
        first: Index of the first layer with something to train; above 0.
        memory: Bytes of hidden states to hold in memory; more go into a temporary file.
        folder: Where that may be; None for the system's own folder.
    """

    def __init__(self, layers: nn.ModuleList, first: int, memory: int, folder: Path | None = None) -> None:
        self.layers = layers
        self.first = first
        self.states = HiddenStates(memory, folder)

    @classmethod
    def of(cls, model: nn.Module, memory: int, folder: Path | None = None) -> HiddenStateCache | None:
        """Of a model; None where training begins in the first layer, or where something else is trained, too."""
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                numbers = [re.match(rf"{re.escape(name)}\.(\d+)\.", path) for path in trained]
                if numbers and all(numbers):
                    first = min(int(found[1]) for found in numbers if found)
                    return cls(module, first, memory, folder) if first else None
        return None

    def __call__(self, model: nn.Module, inner: nn.Module, chunk: dict[str, Any]) -> Any:
        """The model's output for a chunk, whose rows are named under `TEXT_IDS`.

        Args:
            model: Perhaps wrapped in `DistributedDataParallel`.
            inner: The same, not wrapped.
            chunk: Token tensors [rows, tokens] and numbers [rows].
        """
        features = dict(chunk)
        numbers = features.pop(TEXT_IDS).tolist()
        mask = features["attention_mask"].bool()
        kept = []
        for row, number in enumerate(numbers):
            states = self.states.get(number)
            if states is None:
                # alone and without padding: the same digits whatever else a batch holds, in a resumed run, too
                own = {name: _row(value, row, mask) for name, value in features.items()}
                states = self._below(inner, own)[0].cpu()
                self.states.put(number, states)
            kept.append(states)
        rows = torch.cat(kept)
        padded = torch.zeros(*mask.shape, rows.shape[-1], dtype=torch.float32, device=mask.device)
        padded[mask] = rows.to(mask.device, torch.float32)
        with self._skipping(padded):
            return model(features)

    def agrees(self, model: nn.Module, chunk: dict[str, Any], tolerance: float) -> bool:
        """Whether the vectors of a chunk are those of the whole model, to a tolerance; tried, never assumed."""
        plain = {name: value for name, value in chunk.items() if name != TEXT_IDS}
        try:
            with torch.no_grad():
                whole = model(dict(plain))["sentence_embedding"].float()
                twice = [self(model, model, chunk)["sentence_embedding"].float() for _ in range(2)]
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            logger.info("frozen layers are not kept: %s: %s", type(error).__name__, error)
            return False
        scale = float(whole.norm(dim=-1).mean())
        return all(float((whole - other).norm(dim=-1).max()) <= tolerance * scale for other in twice)

    def _below(self, model: nn.Module, features: dict[str, Any]) -> Tensor:
        """What comes into the first adapted layer, [1, tokens, width], in the dtype to keep."""
        found: list[Tensor] = []

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _CapturedError

        handle = self.layers[self.first].register_forward_pre_hook(capture, with_kwargs=True)
        try:
            with torch.no_grad():
                model(dict(features))
        except _CapturedError:
            pass
        finally:
            handle.remove()
        kind = found[0].device.type
        # what the layers above read is rounded to the autocast dtype anyway
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else found[0].dtype
        return found[0].to(dtype)

    @contextmanager
    def _skipping(self, hidden: Tensor) -> Iterator[None]:
        """Within it the lower layers do nothing, and the first adapted one gets `hidden`."""

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        def nothing(*args: Any, **kwargs: Any) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        handle = self.layers[self.first].register_forward_pre_hook(replace, with_kwargs=True)
        lower = [self.layers[i] for i in range(self.first)]
        before = [layer.__dict__.get("forward") for layer in lower]  # accelerate puts its own there
        for layer in lower:
            layer.forward = nothing
        try:
            yield
        finally:
            handle.remove()
            for layer, own in zip(lower, before, strict=True):
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own
