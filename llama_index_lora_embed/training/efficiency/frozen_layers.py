"""Hidden-state cache: frozen layers below the first trained one give the same output in every epoch."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llama_index_lora_embed.core.errors import warn_user

logger = logging.getLogger(__name__)
TEXT_IDS = "text_ids"
"""Key in a chunk of token tensors: the id of each row's text, int [rows]."""
_MIN_FREE_BYTES = 1 << 30  # free space that is left on a disk


def text_id(task: str, text: str, window: int = 0) -> int:
    """Id of a window of a text under a prompt: 63 bits of a digest, the same in every process."""
    digest = hashlib.blake2b(f"{task}\0{window}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class HiddenStateStore:
    """Tensors by text id: `memory` bytes in memory, the rest in a temporary file in `folder` while there is space."""

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        self.memory = self.memory_left = memory
        self.folder = folder
        self.disk_full = False
        self.in_memory: dict[int, Tensor] = {}
        self.on_disk: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self.file: Any = None

    def put(self, text_id: int, states: Tensor) -> None:
        """Store hidden states [tokens, width], if there is space for them."""
        size = states.numel() * states.element_size()
        if size <= self.memory_left:
            self.memory_left -= size
            self.in_memory[text_id] = states.clone()
        elif not self.disk_full:
            try:
                self._write(text_id, states, size)
            except OSError as error:
                self.disk_full = True
                warn_user(
                    f"The hidden-state cache is full after {len(self.in_memory) + len(self.on_disk)} texts ({error}). "
                    "Training goes on and computes the frozen layers of the other texts in each epoch. Raise "
                    "frozen_cache_mb to hold more of them in memory, or free disk space."
                )

    def _write(self, text_id: int, states: Tensor, size: int) -> None:
        if self.file is None:
            # unbuffered, so that a full disk is noticed here
            self.file = tempfile.TemporaryFile(prefix="hidden-states-", dir=self.folder, buffering=0)  # noqa: SIM115
        if shutil.disk_usage(self.folder or tempfile.gettempdir()).free < size + _MIN_FREE_BYTES:
            raise OSError(f"less than {_MIN_FREE_BYTES >> 20} MB would be left free on the disk")
        offset = self.file.seek(0, os.SEEK_END)
        if self.file.write(states.contiguous().view(torch.uint8).numpy().tobytes()) != size:
            raise OSError("the disk took fewer bytes than were written")
        self.on_disk[text_id] = (offset, states.shape, states.dtype)

    def get(self, text_id: int) -> Tensor | None:
        """The stored hidden states, or None."""
        if text_id not in self.on_disk:
            return self.in_memory.get(text_id)
        offset, shape, dtype = self.on_disk[text_id]
        size = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
        self.file.seek(offset)
        return torch.frombuffer(bytearray(self.file.read(size)), dtype=dtype).view(shape)

    def close(self) -> None:
        """Remove everything, the temporary file included; the store can be filled again."""
        self.in_memory, self.on_disk = {}, {}
        self.memory_left, self.disk_full = self.memory, False
        if self.file is not None:
            self.file.close()
            self.file = None


class _CapturedError(Exception):
    """Ends a forward pass as soon as the hidden states are captured."""


class HiddenStateCache:
    """Runs a model from its first trained layer on, with the cached outputs of the frozen layers below.

    `memory` and `folder` are those of the `HiddenStateStore`.
    """

    def __init__(self, layers: nn.ModuleList, first: int, memory: int, folder: Path | None = None) -> None:
        self.layers = layers
        self.first = first
        self.store = HiddenStateStore(memory, folder)

    @classmethod
    def of(cls, model: nn.Module, memory: int, folder: Path | None = None) -> HiddenStateCache | None:
        """Cache for a model; None if its first layer, or a module outside its layers, is trained."""
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                matches = [re.match(rf"{re.escape(name)}\.(\d+)\.", path) for path in trained]
                if matches and all(matches):
                    first = min(int(match[1]) for match in matches if match)
                    return cls(module, first, memory, folder) if first else None
        return None

    def __call__(self, model: nn.Module, inner: nn.Module, chunk: dict[str, Any]) -> Any:
        """The model's output for a chunk, which has the text id of each row under `TEXT_IDS`.

        `model` may be wrapped in `DistributedDataParallel`; `inner` is not.
        """
        features = dict(chunk)
        text_ids = features.pop(TEXT_IDS).tolist()
        mask = features["attention_mask"].bool()
        cached = []
        for row, number in enumerate(text_ids):
            states = self.store.get(number)
            if states is None:
                # alone and without padding: the same digits in every batch, and in a resumed run
                own = {name: _row(value, row, mask) for name, value in features.items()}
                states = self._below(inner, own)[0].cpu()
                self.store.put(number, states)
            cached.append(states)
        rows = torch.cat(cached).to(mask.device, torch.float32)
        padded = torch.zeros(*mask.shape, rows.shape[-1], dtype=torch.float32, device=mask.device)
        padded[mask] = rows
        with self._skip_frozen(padded, rows[None]):
            return model(features)

    def agrees(self, model: nn.Module, chunk: dict[str, Any], tolerance: float) -> bool:
        """Whether the cache gives the whole model's embeddings of a chunk, to a relative tolerance."""
        plain = {name: value for name, value in chunk.items() if name != TEXT_IDS}
        try:
            with torch.no_grad():
                whole = model(dict(plain))["sentence_embedding"].float()
                # computed, then read from the cache
                twice = [self(model, model, chunk)["sentence_embedding"].float() for _ in range(2)]
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            logger.info("no hidden-state cache: %s: %s", type(error).__name__, error)
            return False
        scale = float(whole.norm(dim=-1).mean())
        return all(float((whole - other).norm(dim=-1).max()) <= tolerance * scale for other in twice)

    def _below(self, model: nn.Module, features: dict[str, Any]) -> Tensor:
        """Input of the first trained layer, [1, tokens, width], in the dtype to store."""
        captured: list[Tensor] = []

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.append(args[0] if args else kwargs["hidden_states"])
            raise _CapturedError

        handle = self.layers[self.first].register_forward_pre_hook(capture, with_kwargs=True)
        try:
            with suppress(_CapturedError), torch.no_grad():
                model(dict(features))
        finally:
            handle.remove()
        (states,) = captured
        device = states.device.type
        # the layers above round their input to the autocast dtype anyway
        return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states

    @contextmanager
    def _skip_frozen(self, padded: Tensor, packed: Tensor) -> Iterator[None]:
        """Within it the frozen layers do nothing, and the first trained one gets the states in the shape of its own."""

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own = args[0] if args else kwargs["hidden_states"]
            states = packed if own.shape == packed.shape else padded
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        def nothing(*args: Any, **kwargs: Any) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        handle = self.layers[self.first].register_forward_pre_hook(replace, with_kwargs=True)
        frozen = [self.layers[i] for i in range(self.first)]
        before = [layer.__dict__.get("forward") for layer in frozen]  # accelerate sets its own on the instance
        for layer in frozen:
            layer.forward = nothing
        try:
            yield
        finally:
            handle.remove()
            for layer, forward in zip(frozen, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def _row(value: Any, row: int, mask: Tensor) -> Any:
    """One row of a feature without its padding; values that are not tensors apply to all rows."""
    if not isinstance(value, Tensor):
        return value
    return value[row : row + 1][:, mask[row]] if value.shape == mask.shape else value[row : row + 1]
