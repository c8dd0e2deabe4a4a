"""The embedding models that the service has in memory: one thread computes the texts of all requests together."""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.core.errors import ConfigError, NonFiniteLossError
from llama_index_lora_embed.models.adapter_directory import WEIGHTS_NAME

if TYPE_CHECKING:
    from llama_index_lora_embed.embedding.encode import Task
    from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

logger = logging.getLogger(__name__)

Side = Literal["query", "passage"]
Vectors = npt.NDArray[np.float32]

# Shared by the waiting requests, so that a large one does not hold up the others for long; twice as many would not be
# computed faster, and clients send their next requests while a round is computed.
_TEXTS_PER_ROUND = 64


@dataclass(frozen=True)
class ServedModel:
    """What a model name stands for: a base model, or an adapter on it.

    Attributes:
        base: Folder or Hub id of the base model.
        adapter: Folder of the adapter; None for the base model alone.
    """

    base: str
    adapter: str | None = None


@dataclass(frozen=True)
class Embedded:
    """The vectors of a request.

    Attributes:
        vectors: float32 [texts, dimensions].
        tokens: Tokens of all texts by the model's tokenizer, prompts and special tokens included, before truncation.
        truncated: Number of texts that are longer than the model reads.
    """

    vectors: Vectors
    tokens: int
    truncated: int


@dataclass(eq=False)
class _Request:
    """Texts of a request, of which the first ones are computed already."""

    model: ServedModel
    texts: list[str]
    side: Side
    dimensions: int | None
    arrived: float = field(default_factory=time.monotonic)
    future: Future[Embedded] = field(default_factory=Future)
    parts: list[Embedded] = field(default_factory=list)
    computed: int = 0

    def add(self, part: Embedded) -> None:
        """Take the vectors of the next texts; the last ones complete the request."""
        self.parts.append(part)
        self.computed += len(part.vectors)
        if self.computed == len(self.texts):
            vectors = np.concatenate([part.vectors for part in self.parts])
            tokens, truncated = (sum(getattr(p, name) for p in self.parts) for name in ("tokens", "truncated"))
            self._end(Embedded(vectors, tokens, truncated))

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        self._end(error)

    def _end(self, result: Embedded | BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            if isinstance(result, Embedded):
                self.future.set_result(result)
            else:
                self.future.set_exception(result)


_Member: TypeAlias = tuple[_Request, str | None, list[str]]  # with the name of its adapter, and its next texts


class Batcher:
    """Computes the vectors of all requests in one thread.

    Requests that arrive within `wait_s` of each other, or while others are computed, become one mixed batch of the
    adapter pool of their base model. Each round computes at most 64 texts, in equal shares of the waiting requests.
    An error of one request never fails the others of its batch. Models are loaded when they are first named.

    Args:
        wait_s: Seconds for which a request waits for others.
        max_models: Base models in memory, adapters that cannot share their base's forward passes (DoRA, windows, heads
            of their own) included; the least recently used one is freed.
        max_adapters: Adapters in memory with each base model.
        device: torch device; None lets sentence-transformers choose.
    """

    def __init__(
        self, *, wait_s: float = 0.003, max_models: int = 2, max_adapters: int = 32, device: str | None = None
    ) -> None:
        self._wait_s = wait_s
        self._models = _Models(max_models, max_adapters, device)
        self._arriving: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    async def embed(
        self, model: ServedModel, texts: Sequence[str], side: Side = "passage", *, dimensions: int | None = None
    ) -> Embedded:
        """The vectors of at least one text, in their order; a caller that is cancelled withdraws the request.

        Args:
            model: What to embed with.
            texts: Queries or passages.
            side: Which of the two, which selects the prompt.
            dimensions: Number of leading dimensions to keep, scaled to length 1 again if the model's vectors have it.

        Raises:
            ConfigError: `dimensions` exceeds the model's, or this object is closed.
            LoraEmbedError: The model cannot be loaded.
            NonFiniteLossError: A vector is NaN or infinite.
        """
        return await asyncio.wrap_future(self.submit(model, texts, side, dimensions=dimensions))

    def submit(
        self, model: ServedModel, texts: Sequence[str], side: Side = "passage", *, dimensions: int | None = None
    ) -> Future[Embedded]:
        """`embed`, for callers without an event loop."""
        request = _Request(model, list(texts), side, dimensions)
        with self._lock:
            if self._closed:
                raise ConfigError("a request to embedding models that are closed", "an open service", "Start it again.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lora-embed-batcher", daemon=True)
                self._thread.start()
            self._arriving.put(request)
        return request.future

    def close(self) -> None:
        """Fail what is waiting, and free the models after the round that is computed now."""
        with self._lock:
            self._closed = True
            self._arriving.put(None)
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        waiting: deque[_Request] = deque()
        while self._take(waiting):
            share = max(1, _TEXTS_PER_ROUND // len(waiting))
            chosen = list(waiting)[:_TEXTS_PER_ROUND]
            self._compute([(request, request.texts[request.computed :][:share]) for request in chosen])
            waiting.rotate(-len(chosen))
            waiting = deque(request for request in waiting if not request.future.done())
        for request in waiting:
            request.fail(ConfigError("a service that is shutting down", "a running one", "Send the request again."))
        self._models.clear()

    def _take(self, waiting: deque[_Request]) -> bool:
        """Add the requests that have arrived; wait for others only while the oldest has not waited for long."""
        while True:
            try:
                if not waiting:
                    request = self._arriving.get()
                else:
                    left = waiting[0].arrived + self._wait_s - time.monotonic()
                    request = self._arriving.get(timeout=left) if left > 0 else self._arriving.get_nowait()
            except queue.Empty:
                return True
            if request is None:
                return False
            waiting.append(request)

    def _compute(self, slices: list[tuple[_Request, list[str]]]) -> None:
        """Add vectors to requests; those of one base model and side are computed together."""
        groups: dict[tuple[int, Side], tuple[LoraEmbedding, list[_Member]]] = {}
        for request, texts in slices:
            if request.future.cancelled():
                continue
            try:
                model, name = self._models.find(request.model)
            except Exception as error:
                request.fail(error)
            else:
                groups.setdefault((id(model), request.side), (model, []))[1].append((request, name, texts))
        for model, members in groups.values():
            try:
                parts = _embed(model, members)
            except Exception:
                if len(members) > 1:
                    logger.exception("A mixed batch failed; its %d requests are computed one by one.", len(members))
                for member in members:  # so that only those fail that are at fault
                    try:
                        self._finish([member], _embed(model, [member]))
                    except Exception as error:
                        member[0].fail(error)
            else:
                self._finish(members, parts)

    @staticmethod
    def _finish(members: list[_Member], parts: list[Embedded | Exception]) -> None:
        for (request, _, _), part in zip(members, parts, strict=True):
            if isinstance(part, Exception):
                request.fail(part)
            else:
                request.add(part)


class _Models:
    """The least recently used models are freed beyond `max_models`; only the batcher's thread uses it."""

    def __init__(self, max_models: int, max_adapters: int, device: str | None) -> None:
        self._max_models = max_models
        self._max_adapters = max_adapters
        self._device = device
        self._loaded: OrderedDict[tuple[str, ...], LoraEmbedding] = OrderedDict()

    def clear(self) -> None:
        self._loaded.clear()
        gc.collect()

    def find(self, model: ServedModel) -> tuple[LoraEmbedding, str | None]:
        """A loaded embedding model that computes a model, and the name of the adapter in it."""
        if model.adapter is None:
            return self._shared(model.base), None
        name = f"{model.adapter}@{_written(model.adapter)}"  # a retrained adapter is another one
        alone = (model.base, name)
        if alone in self._loaded:
            return self._get(alone), None
        shared = self._shared(model.base)
        if name not in shared.list_adapters():
            try:
                shared.add_adapter(name, model.adapter)
            except ConfigError:  # more than plain LoRA
                from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

                loaded = LoraEmbedding(model.adapter, base_model=model.base, device=self._device)
                return self._keep(alone, loaded), None
        return shared, name

    def _shared(self, base: str) -> LoraEmbedding:
        if (base,) in self._loaded:
            return self._get((base,))
        from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

        loaded = LoraEmbedding(base_model=base, adapters={}, max_adapters=self._max_adapters, device=self._device)
        return self._keep((base,), loaded)

    def _get(self, key: tuple[str, ...]) -> LoraEmbedding:
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _keep(self, key: tuple[str, ...], model: LoraEmbedding) -> LoraEmbedding:
        self._loaded[key] = model
        while len(self._loaded) > self._max_models:
            self._loaded.popitem(last=False)
            gc.collect()  # models have reference cycles
        return model


def _written(adapter: str) -> int:
    """When an adapter was written, in nanoseconds; 0 if its weights are missing, which opening it reports."""
    try:
        return (Path(adapter) / WEIGHTS_NAME).stat().st_mtime_ns
    except OSError:
        return 0


def _embed(model: LoraEmbedding, members: list[_Member]) -> list[Embedded | Exception]:
    """Vectors for each request of one side, computed together; or an error that concerns this request alone."""
    from llama_index_lora_embed.embedding.backends import PooledBackend
    from llama_index_lora_embed.models.adapter_directory import normalises
    from llama_index_lora_embed.models.tokens import check_texts, count_tokens

    backend = model.backend
    task: Task = "query" if members[0][0].side == "query" else "document"
    texts = check_texts([text for _, _, some in members for text in some])
    names = [name for _, name, some in members for _ in some]
    named: dict[str, Any] = {}
    prompts: dict[str | None, str] = {None: str(backend.model.prompts.get(task) or "")}
    limits: dict[str | None, int] = {None: backend.max_seq_length}
    if isinstance(backend, PooledBackend):
        named = {"names": names}
        for known in {name for name in names if name is not None}:
            adapter = backend.adapters[known]
            prompts[known], limits[known] = adapter.prompts[task], adapter.max_seq_length
    vectors = backend.encode(texts, task, max_texts=model.embed_batch_size, **named)
    with backend.lock:
        counts = count_tokens(backend.model, [prompts[n] + text for n, text in zip(names, texts, strict=True)])
    parts: list[Embedded | Exception] = []
    start = 0
    for request, name, some in members:
        rows, tokens = vectors[start : start + len(some)], counts[start : start + len(some)]
        start += len(some)
        try:
            rows = _cut(rows, request.dimensions, unit_length=normalises(backend.model))
        except Exception as error:
            parts.append(error)
        else:
            parts.append(Embedded(rows, sum(tokens), sum(count > limits[name] for count in tokens)))
    return parts


def _cut(vectors: Vectors, dimensions: int | None, *, unit_length: bool) -> Vectors:
    """The first dimensions of vectors, which are checked to be finite."""
    if not np.isfinite(vectors).all():
        raise NonFiniteLossError("NaN or infinity in a vector", "finite numbers", "Train the model again.")
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    if dimensions > vectors.shape[1]:
        raise ConfigError(
            f"dimensions={dimensions}", f"at most {vectors.shape[1]}, the model's own", "Leave dimensions out."
        )
    kept = vectors[:, :dimensions]
    return unit_norm(kept) if unit_length else kept
