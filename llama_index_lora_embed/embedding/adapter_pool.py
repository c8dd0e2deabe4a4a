"""Many adapters on one base model in memory: each text is embedded with the adapter that it names."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
from transformers.utils import logging as transformers_logging

from llama_index_lora_embed.core.errors import AdapterError, ConfigError, LoraEmbedError
from llama_index_lora_embed.core.files import file_digest
from llama_index_lora_embed.embedding.encode import NO_ADAPTER, Task, Vectors, encode
from llama_index_lora_embed.models.adapter_directory import CONFIG_NAME, WEIGHTS_NAME, Manifest, fingerprint
from llama_index_lora_embed.models.base_model import BaseInfo, load_base
from llama_index_lora_embed.models.lora_adapter import (
    check_effect,
    check_keys,
    check_poolable,
    does_not_load,
    scale_lora,
)
from llama_index_lora_embed.models.opened_adapter import OpenedAdapter
from llama_index_lora_embed.models.windows import check_prompts, longest_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_MIXED_TOLERANCE = 1e-4  # relative; padding changes sums in their last digits
_MAX_SPECIAL_TOKENS = 16  # upper bound of the special tokens that a tokenizer adds to a text


@dataclass(frozen=True)
class PooledAdapter:
    """An adapter that a pool can load.

    Its `name` is peft's, made of its weights, settings and scale, so that users of one base model share it; its
    `fingerprint` is that of `LoraEmbedding(path)`; `prompts` has "query" and "document". With `query_only`, passages
    are embedded by the base alone, under the adapter's prompt.
    """

    name: str
    path: Path
    prompts: dict[str, str]
    max_seq_length: int
    fingerprint: str
    manifest: Manifest | None
    scale: float
    query_only: bool = False


class AdapterPool:
    """A loaded base model and the adapters in memory with it.

    All users of one base model in a process share one pool (`AdapterPool.of`), which is freed with the last of them.
    Methods may be called from several threads, which take turns. Only the pool may change its `model`.
    """

    _pools: ClassVar[WeakValueDictionary[tuple[Any, ...], AdapterPool]] = WeakValueDictionary()
    _pools_lock: ClassVar[Any] = threading.Lock()

    def __init__(self, base: BaseInfo, model: SentenceTransformer, pooling: str | None = None) -> None:
        self.base = base
        self.model = model
        self.pooling = pooling
        self.prompts = {task: model.prompts.get(task) or "" for task in ("query", "document")}
        self.max_seq_length = int(model.max_seq_length or 0)
        self.max_adapters = 1
        self.lock = threading.RLock()
        self._loaded: OrderedDict[str, None] = OrderedDict()  # the least recently used adapter first
        self._can_mix: bool | None = None

    @classmethod
    def of(cls, base: BaseInfo, *, max_adapters: int = 1, **loading: Any) -> AdapterPool:
        """The process's pool of a base model, which is loaded by `load_base` if there is none with these arguments.

        The largest `max_adapters` of all users counts.
        """
        key = (base.weights_sha256, str(base.path), *sorted(loading.items()))
        with cls._pools_lock:
            pool = cls._pools.get(key)
            if pool is None:
                pool = cls._pools[key] = cls(base, load_base(base, **loading), loading.get("pooling"))
            pool.max_adapters = max(pool.max_adapters, max_adapters)
            return pool

    def loaded(self) -> list[str]:
        """Names that peft has for the adapters in memory, the least recently used first."""
        with self.lock:
            return list(self._loaded)

    def fingerprint_of(
        self,
        prompts: Mapping[str, str],
        max_seq_length: int,
        directory: Path | None = None,
        scale: float = 1.0,
        tune: str = "both",
    ) -> str:
        """`fingerprint` of the base model, or of an adapter directory, with these prompts and this length."""
        with self.lock, self._length(max_seq_length):
            check_prompts(self.model, prompts)
            weights = self.base.weights_sha256
            return fingerprint(self.model, weights, directory, scale=scale, prompts=prompts, tune=tune)

    def register(self, adapter: OpenedAdapter, *, prompts: Mapping[str, str], scale: float) -> PooledAdapter:
        """Check that an adapter can be used here; its weights are loaded when a text first names it.

        `prompts` override the recorded ones.

        Raises:
            AdapterError: The adapter has no effect.
            ConfigError: As `check_poolable`.
        """
        check_poolable(adapter, self.model, self.pooling)
        check_effect(adapter)
        prompts = {**self.prompts, **adapter.prompts(), **prompts}
        limit = min(adapter.max_seq_length() or self.max_seq_length, longest_text(self.model))
        tune, folder = adapter.tune(), adapter.directory
        digest = self.fingerprint_of(prompts, limit, folder, scale, tune)
        name = _peft_name(folder, scale)
        return PooledAdapter(name, folder, prompts, limit, digest, adapter.manifest, scale, tune == "query")

    def encode(
        self,
        texts: Sequence[str],
        adapters: Sequence[PooledAdapter | None],
        task: Task,
        *,
        base_prompts: Mapping[str, str],
        **limits: Any,
    ) -> Vectors:
        """Vectors of texts, float32 [texts, dimension], in as few forward passes as for a single adapter.

        Each text has its adapter, or None for the base model with `base_prompts`; if they name more than
        `max_adapters`, they are computed in several rounds. `limits` are those of `encode.encode`.

        Raises:
            AdapterError: An adapter's files have changed since `register`, or do not fit the base model.
        """
        loras = [None if a is None or (a.query_only and task == "document") else a for a in adapters]
        by_name: dict[str, list[int]] = defaultdict(list)
        for index, adapter in enumerate(loras):
            by_name[NO_ADAPTER if adapter is None else adapter.name].append(index)
        out: Vectors | None = None
        with self.lock:
            for names in self._rounds(by_name, loras):
                indices = [i for name in names for i in by_name[name]]
                self._load_all({a.name: a for i in indices if (a := loras[i]) is not None})
                groups = self._group(texts, adapters, indices, task, base_prompts)
                for (prompt, limit), members in groups.items():
                    with self._length(limit):
                        vectors = encode(
                            self.model,
                            [texts[i] for i in members],
                            task,
                            prompt=prompt,
                            adapters=[NO_ADAPTER if (a := loras[i]) is None else a.name for i in members],
                            **limits,
                        )
                    if out is None:
                        out = np.empty((len(texts), vectors.shape[1]), dtype=np.float32)
                    out[members] = vectors
        return encode(self.model, [], task) if out is None else out

    def _rounds(self, by_name: dict[str, list[int]], adapters: Sequence[PooledAdapter | None]) -> list[list[str]]:
        """Names of the adapters that are computed together."""
        names = list(by_name)
        size = self.max_adapters if len(names) < 2 or self._mixing_works(by_name, adapters) else 1
        return [names[i : i + size] for i in range(0, len(names), size)]

    def _mixing_works(self, by_name: dict[str, list[int]], adapters: Sequence[PooledAdapter | None]) -> bool:
        """Whether every layer keeps one row per text; tried once, with the first two adapters.

        The layers of some architectures see tokens before texts, or share rows among texts.
        """
        if self._can_mix is None:
            some = [name for name in by_name if name != NO_ADAPTER][: max(1, min(2, self.max_adapters))]
            self._load_all({n: a for n in some if (a := adapters[by_name[n][0]]) is not None})
            names = [*some, NO_ADAPTER]
            texts = ["which rows are of which text, in every layer?", "a text that is a little longer, another one",
                     "the base alone for this one, with no adapter"][: len(names)]  # fmt: skip
            try:
                mixed = encode(self.model, texts, "document", prompt="", adapters=names)
                alone = [
                    encode(self.model, [t], "document", prompt="", adapters=[n])
                    for t, n in zip(texts, names, strict=True)
                ]
                scale = float(np.abs(alone).max())
                self._can_mix = bool(np.abs(mixed - np.concatenate(alone)).max() <= _MIXED_TOLERANCE * scale)
            except (ConfigError, ValueError, RuntimeError, TypeError, IndexError) as error:
                logger.info("Adapters of %s are computed one after the other: %s", self.base.model_id, error)
                self._can_mix = False
        return self._can_mix

    def _group(
        self,
        texts: Sequence[str],
        adapters: Sequence[PooledAdapter | None],
        indices: list[int],
        task: Task,
        base_prompts: Mapping[str, str],
    ) -> dict[tuple[str, int], list[int]]:
        """Indices of the texts that can share a forward pass, by prompt and length.

        A text that is too short to be truncated fits any length.
        """
        lengths = [self.max_seq_length if a is None else a.max_seq_length for a in (adapters[i] for i in indices)]
        shortest = min(lengths, default=0)
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for index, length in zip(indices, lengths, strict=True):
            adapter, text = adapters[index], texts[index]
            prompt = (base_prompts if adapter is None else adapter.prompts)[task]
            # an ASCII character is at most one token
            fits = text.isascii() and prompt.isascii() and len(prompt) + len(text) + _MAX_SPECIAL_TOKENS <= shortest
            groups[prompt, shortest if fits else length].append(index)
        return groups

    @contextmanager
    def _length(self, limit: int) -> Iterator[None]:
        self.model.max_seq_length = limit
        try:
            yield
        finally:
            self.model.max_seq_length = self.max_seq_length

    def _load_all(self, wanted: dict[str, PooledAdapter]) -> None:
        """Load adapters, and unload the least recently used others beyond `max_adapters`."""
        for name in wanted:
            if name in self._loaded:
                self._loaded.move_to_end(name)
        for name in [name for name in self._loaded if name not in wanted]:
            if len(self._loaded.keys() | wanted.keys()) <= self.max_adapters:
                break
            self.unload(name)
        for name, adapter in wanted.items():
            if name not in self._loaded:
                self._load(adapter)
                self._loaded[name] = None

    def unload(self, name: str) -> None:
        """Free an adapter's memory after the calls that use it; it is loaded again when a text names it."""
        with self.lock:
            if name in self._loaded:
                self.model.delete_adapter(name)
                del self._loaded[name]

    def _load(self, adapter: PooledAdapter) -> None:
        _check_unchanged(adapter)
        try:
            with _without_loading_report():
                self.model.load_adapter(str(adapter.path), adapter_name=adapter.name)
            check_keys(self.model, adapter.path, adapter.name)
            _check_unchanged(adapter)  # it may have been replaced while it was read
            scale_lora(self.model, adapter.scale, adapter.name)
        except BaseException as error:
            with suppress(Exception):
                self.model.delete_adapter(adapter.name)
            if isinstance(error, LoraEmbedError) or not isinstance(error, Exception):
                raise
            raise does_not_load(adapter.path, self.base, error) from error


@contextmanager
def _without_loading_report() -> Iterator[None]:
    """Without transformers' report that a file lacks the other adapters' weights; `check_keys` does this check."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_unchanged(adapter: PooledAdapter) -> None:
    if not adapter.path.is_dir() or _peft_name(adapter.path, adapter.scale) != adapter.name:
        raise AdapterError(
            f"{str(adapter.path)!r}, which has changed since it was added",
            f"the adapter with the fingerprint {adapter.fingerprint[:12]}...",
            "Add it again under its name, and rebuild the index.",
        )


def _peft_name(directory: Path, scale: float) -> str:
    """A name for peft, which must contain no dots, made of the adapter's content and not of its path."""
    parts = [file_digest(directory / name) for name in (WEIGHTS_NAME, CONFIG_NAME)]
    digits = "" if scale == 1 else f"_{float(scale).hex().replace('.', 'd')}"
    return "adapter_" + "_".join(part[:16] for part in parts) + digits
