"""Embed texts with any LlamaIndex embedding model: in batches, with concurrent requests, through a cache on disk."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.core.errors import ConfigError, NonFiniteLossError
from llama_index_lora_embed.embedding.adapter_embedding import AdapterEmbeddingModel
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding
from llama_index_lora_embed.evaluation.embedding_cache import EmbeddingCache, model_identity
from llama_index_lora_embed.evaluation.search import FloatArray

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_CHUNK = 1024  # texts whose vectors are Python lists at one time
_AT_ONCE = 256  # texts of a call of `_at_once`: enough to order, and no more are lost when a process is killed
_HUGGING_FACE = "llama_index.embeddings.huggingface.base.HuggingFaceEmbedding"
_SAVE_SECONDS = 1.0  # between writes to the cache, so that little is lost when a process is killed
# tells models apart: long enough to be truncated, with capitals, digits and a question
_PROBE = "Which of these 12 Words does it read? " + " ".join(
    f"Part {i} of a long text, {i * 7} of it." for i in range(90)
)
_SAME_MODEL = 0.9999  # cosine of two probe vectors of one model; APIs are not exact to the last digit
_BLOCK = 16_384  # rows of vectors
_UNIT = 1e-5  # how far the length of a vector in float32 is from 1 that was scaled to 1
_EXAMPLES = 3  # ids that a message names

_T = TypeVar("_T")
Side = Literal["query", "passage"]


@dataclass(frozen=True)
class Embedder:
    """Embeds texts as float32 vectors with a LlamaIndex embedding model; see `evaluate_retrieval`.

    Raises:
        ConfigError: embed_model is not an embedding model, or num_workers is not a positive number.
    """

    embed_model: BaseEmbedding
    num_workers: int | None
    cache_folder: str | os.PathLike[str] | None
    show_progress: bool

    def __post_init__(self) -> None:
        from llama_index.core.base.embeddings.base import BaseEmbedding

        if not isinstance(self.embed_model, BaseEmbedding):
            raise ConfigError(
                f"an embedding model of type {type(self.embed_model).__name__}",
                "a LlamaIndex BaseEmbedding",
                'LoraEmbedding("runs/handbook"), LoraEmbedding(base_model="..."), HuggingFaceEmbedding(...), ...',
            )
        check_num_workers(self.num_workers)

    async def embed(self, texts: Sequence[str], side: Side) -> FloatArray:
        """Vectors [texts, dimensions] of at least one text, in an array that the caller may change.

        With `num_workers` the asynchronous methods of the model are awaited; without, this coroutine never suspends.

        Raises:
            ConfigError: The vectors differ in length, or their number is not that of the texts.
            OutputDirectoryError: cache_folder cannot be written.
        """
        if isinstance(self.embed_model, AdapterEmbeddingModel):  # the model below it may be paid for already
            below = await replace(self, embed_model=self.embed_model.base_embed_model).embed(texts, side)
            return self.embed_model.transform(below) if side == "query" or self.embed_model.is_bridge else below
        vectors: FloatArray | None = None
        cache = await self._open_cache(side)
        with tqdm(total=len(texts), desc=f"{side} vectors", disable=not self.show_progress) as bar:
            for start in range(0, len(texts), _CHUNK):
                chunk = list(texts[start : start + _CHUNK])
                found = {} if cache is None else cache.read(chunk)
                missing = [text for text in dict.fromkeys(chunk) if text not in found]
                rows = found | (await self._request(missing, side, cache) if missing else {})
                if vectors is None:
                    vectors = np.empty((len(texts), len(rows[chunk[0]])), dtype=np.float32)
                dimensions = {vectors.shape[1], *map(len, rows.values())}
                if len(dimensions) > 1:
                    raise ConfigError(
                        f"vectors of different dimensions ({', '.join(map(str, sorted(dimensions)[:5]))})",
                        "one number of dimensions",
                        "The embedding model gives texts vectors that cannot be compared: check its settings.",
                    )
                vectors[start : start + len(chunk)] = [rows[text] for text in chunk]
                bar.update(len(chunk))
        assert vectors is not None, "a checked dataset has texts"
        return vectors

    async def _open_cache(self, side: Side) -> EmbeddingCache | None:
        """The cache file of the model, found by its fingerprint, or by its settings and the vector of a probe."""
        if self.cache_folder is None:
            return None
        folder = Path(self.cache_folder).expanduser()
        name, complete = model_identity(self.embed_model)
        if complete:
            return EmbeddingCache(folder / name / f"{side}.sqlite")
        probe = (await self._request([_PROBE], side, None))[_PROBE]
        if not np.isfinite(probe).all():
            return None
        number = 0
        while True:  # models with equal settings but different vectors have a file each
            cache = EmbeddingCache(folder / f"{name}-{number}" / f"{side}.sqlite")
            if not cache.read([_PROBE]):
                cache.write([_PROBE], [probe])  # another process may be first
            cached = cache.read([_PROBE]).get(_PROBE)
            if cached is not None and _is_same_direction(cached, probe):
                return cache
            number += 1

    async def _request(self, texts: list[str], side: Side, cache: EmbeddingCache | None) -> dict[str, FloatArray]:
        """Vectors of different texts by text. What arrives before an error is cached, so that it is paid for once."""
        model = self.embed_model
        arrived = _Arrived(type(model).__name__, cache)
        at_once = None if self.num_workers is not None else _at_once(model, side)
        size = model.embed_batch_size if at_once is None else _AT_ONCE
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]

        async def query(text: str) -> None:
            arrived.add([text], [await model.aget_query_embedding(text)])

        async def passages(batch: list[str]) -> None:
            arrived.add(batch, await model.aget_text_embedding_batch(batch))

        try:
            if self.num_workers is not None and side == "query":
                await gather_limited([partial(query, text) for text in texts], self.num_workers)
            elif self.num_workers is not None:
                await gather_limited([partial(passages, batch) for batch in batches], self.num_workers)
            elif at_once is not None:
                for batch in batches:
                    arrived.add(batch, at_once(batch))
            elif side == "passage":
                for batch in batches:
                    arrived.add(batch, model.get_text_embedding_batch(batch))
            else:
                for text in texts:
                    arrived.add([text], [model.get_query_embedding(text)])
        finally:
            arrived.save()
        return arrived.vectors


def _at_once(model: BaseEmbedding, side: Side) -> Callable[[list[str]], Any] | None:
    """A model's own method for many texts, which orders them by length; None for models that have none.

    LlamaIndex asks for queries singly, and for passages `embed_batch_size` at a time in the order in which they come,
    so that most of a batch can be padding.
    """
    if isinstance(model, LoraEmbedding):
        return model._get_query_embeddings if side == "query" else model.get_text_embedding_batch
    cls = type(model)  # a subclass may compute its vectors otherwise
    if f"{cls.__module__}.{cls.__name__}" == _HUGGING_FACE and model.embeddings_cache is None:
        embed: Any = model._embed  # type: ignore[attr-defined]
        return partial(embed, prompt_name="query" if side == "query" else "text")
    return None


class _Arrived:
    """Vectors by text as they arrive from a model of this name; the cache gets them within about a second."""

    def __init__(self, name: str, cache: EmbeddingCache | None) -> None:
        self.vectors: dict[str, FloatArray] = {}
        self._name = name
        self._cache = cache
        self._unsaved: list[str] = []
        self._saved_at = time.monotonic()

    def add(self, texts: list[str], vectors: Any) -> None:
        """Take the vectors of some texts; raises a ConfigError if their number is not that of the texts."""
        count = len(vectors) if isinstance(vectors, Sequence) else 0
        if count != len(texts):
            raise ConfigError(
                f"{count} vectors for {len(texts)} texts from {self._name}",
                "a vector for each text, in their order",
                "The embedding model drops texts: check how it treats empty or repeated ones.",
            )
        self.vectors |= {t: np.asarray(vector, dtype=np.float32) for t, vector in zip(texts, vectors, strict=True)}
        self._unsaved += texts
        if time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Cache what arrived since the last time."""
        if self._cache is not None and self._unsaved:
            self._cache.write(self._unsaved, [self.vectors[text] for text in self._unsaved])
        self._unsaved, self._saved_at = [], time.monotonic()


def _is_same_direction(left: FloatArray, right: FloatArray) -> bool:
    lengths = np.linalg.norm(left) * np.linalg.norm(right)
    return left.shape == right.shape and bool(left @ right >= _SAME_MODEL * lengths)


async def gather_limited(calls: Sequence[Callable[[], Awaitable[_T]]], limit: int) -> list[_T]:
    """Results of asynchronous calls in their order, at most `limit` at a time; the first error cancels the others."""
    semaphore = asyncio.Semaphore(limit)

    async def run(call: Callable[[], Awaitable[_T]]) -> _T:
        async with semaphore:
            return await call()

    tasks = [asyncio.ensure_future(run(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def check_num_workers(num_workers: Any) -> None:
    """Raise a ConfigError unless `num_workers` is None or a positive number."""
    if num_workers is not None and not is_int(num_workers, 1):
        raise ConfigError(f"num_workers={num_workers!r}", "None or a number above 0", "num_workers=4")


def unit_vectors(vectors: Any, ids: Sequence[str], name: str) -> FloatArray:
    """Check vectors [ids, dimensions] and scale them to length 1; zeros stay zeros.

    A writable float32 array is scaled in place. An array that is memory-mapped for reading (`np.load(path,
    mmap_mode="r")`) stays on disk if its vectors have length 1, and is copied otherwise. `name`, what the vectors are
    of, is for error messages.

    Raises:
        ConfigError: Their number is not that of the ids.
        NonFiniteLossError: Some are NaN or infinite.
    """
    mapped = isinstance(vectors, np.memmap) and vectors.dtype == np.float32 and not vectors.flags.writeable
    if mapped and vectors.ndim == 2 and _have_unit_length(vectors):
        array: FloatArray = vectors
    else:
        array, mapped = np.require(vectors, np.float32, ["W"]), False
    if array.ndim != 2 or len(array) != len(ids):
        raise ConfigError(
            f"{name} vectors of shape {array.shape}", f"one vector for each of {len(ids)} texts", "Check the encoder."
        )
    bad = [ids[start + row] for start, block in _blocks(array) for row in np.flatnonzero(~_are_finite(block)).tolist()]
    if bad:
        raise NonFiniteLossError(
            f"NaN or infinity in {len(bad)} of {len(array)} {name} vectors ({examples(bad)})",
            "finite numbers",
            "Lower the learning_rate of a model in training; load any other model in float32.",
        )
    if not mapped:
        for _, block in _blocks(array):
            unit_norm(block, out=block)
    return array


def _blocks(array: FloatArray) -> Iterator[tuple[int, FloatArray]]:
    """(first row, rows): what is computed of all at once would take as much memory as the vectors."""
    return ((start, array[start : start + _BLOCK]) for start in range(0, len(array), _BLOCK))


def _are_finite(block: FloatArray) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(block).all(axis=1))


def _have_unit_length(array: FloatArray) -> bool:
    return all(bool(np.allclose(np.linalg.norm(block, axis=1), 1, atol=_UNIT)) for _, block in _blocks(array))


def examples(ids: Sequence[str]) -> str:
    """The first ids, for a message."""
    return ", ".join(repr(i) for i in ids[:_EXAMPLES]) + (", ..." if len(ids) > _EXAMPLES else "")
