"""Vectors of any LlamaIndex embedding model: some texts at a time, many requests at once, kept on disk by text."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from tqdm.auto import tqdm

from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.evaluation.embedding_cache import EmbeddingCache, identity
from llama_index_lora_embed.evaluation.search import FloatArray

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_AT_ONCE = 1024  # texts whose vectors are Python lists at one time, and that are kept together
# what no two models read alike: long enough to be cut, with capitals, digits and a question
_PROBE = "Which of these 12 Words does it read? " + " ".join(
    f"Part {i} of a long text, {i * 7} of it." for i in range(90)
)
_SAME = 0.9999  # cosine from which a probe's vector is the same model's; APIs are not exact to the last digit

_T = TypeVar("_T")
Side = Literal["query", "passage"]


class Embedder:
    """Makes float32 vectors with a LlamaIndex embedding model.

    Args:
        embed_model: Any.
        num_workers: Requests under way at once; None embeds synchronously.
        cache_folder: Where vectors are kept; None keeps none.
        show_progress: Show a bar.

    Raises:
        ConfigError: The model is none, or num_workers is no positive number.
    """

    def __init__(
        self,
        embed_model: BaseEmbedding,
        *,
        num_workers: int | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
        show_progress: bool = False,
    ) -> None:
        from llama_index.core.base.embeddings.base import BaseEmbedding

        if not isinstance(embed_model, BaseEmbedding):
            raise ConfigError(
                f"an embedding model of type {type(embed_model).__name__}",
                "a LlamaIndex BaseEmbedding",
                'LoraEmbedding("runs/handbook"), LoraEmbedding(base_model="..."), HuggingFaceEmbedding(...), ...',
            )
        self.embed_model = embed_model
        self.num_workers = checked_workers(num_workers)
        self.show_progress = show_progress
        self.cache_folder = None if cache_folder is None else Path(cache_folder).expanduser()

    async def vectors(self, texts: Sequence[str], side: Side) -> FloatArray:
        """Vectors of texts, [texts, dimensions], in an array of their own.

        With `num_workers` the model's asynchronous methods are awaited in the loop that runs this; without, nothing
        is awaited at all.

        Raises:
            ConfigError: They differ in length, or there are not as many as texts.
            OutputDirectoryError: cache_folder cannot be written.
        """
        made: FloatArray | None = None
        kept = None if self.cache_folder is None else await self._kept(self.cache_folder, side)
        with tqdm(total=len(texts), desc=f"{side} vectors", disable=not self.show_progress) as bar:
            for start in range(0, len(texts), _AT_ONCE):
                part = list(texts[start : start + _AT_ONCE])
                found = {} if kept is None else kept.read(part)
                missing = [text for text in dict.fromkeys(part) if text not in found]
                if missing:
                    fresh = await self._make(missing, side)
                    found |= dict(zip(missing, fresh, strict=True))
                    if kept is not None:
                        kept.write(missing, fresh)
                rows = _one_length([found[text] for text in part])
                if made is None:
                    made = np.empty((len(texts), rows.shape[1]), dtype=np.float32)
                if rows.shape[1] != made.shape[1]:
                    raise _differing([made.shape[1], rows.shape[1]])
                made[start : start + len(part)] = rows
                bar.update(len(part))
        assert made is not None, "a dataset that was checked has texts"
        return made

    async def _kept(self, folder: Path, side: Side) -> EmbeddingCache | None:
        """The model's own file, by its fingerprint, or by its settings and by what it makes of a text; or None."""
        name, certain = identity(self.embed_model)
        if certain:
            return EmbeddingCache(folder / name / f"{side}.sqlite")
        probe = (await self._make([_PROBE], side))[0]
        if not np.isfinite(probe).all():
            return None
        number = 0
        while True:  # models that tell the same of themselves have a file each
            file = EmbeddingCache(folder / f"{name}-{number}" / f"{side}.sqlite")
            if _PROBE not in file.read([_PROBE]):
                file.write([_PROBE], probe[None], replace=False)  # another process may be the first
            before = file.read([_PROBE]).get(_PROBE)
            if before is None:  # damaged
                file.write([_PROBE], probe[None])
                before = probe
            if before.shape == probe.shape and float(before @ probe) >= _SAME * float(
                np.linalg.norm(before) * np.linalg.norm(probe)
            ):
                return file
            number += 1

    async def _make(self, texts: list[str], side: Side) -> FloatArray:
        from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

        model = self.embed_model
        made: Any
        if self.num_workers is not None:
            made = await self._make_together(texts, side, self.num_workers)
        elif side == "passage":
            made = model.get_text_embedding_batch(texts)
        elif isinstance(model, LoraEmbedding):
            made = model._get_query_embeddings(texts)  # LlamaIndex has no batches of queries
        else:
            made = [model.get_query_embedding(text) for text in texts]
        count = len(made) if isinstance(made, Sequence) else 0
        if count != len(texts):
            raise ConfigError(
                f"{count} vectors of {len(texts)} texts from {type(model).__name__}",
                "a vector for each text, in their order",
                "The embedding model leaves texts out; look at how it treats empty or repeated ones.",
            )
        return _one_length(made)

    async def _make_together(self, texts: list[str], side: Side, at_once: int) -> list[Any]:
        model = self.embed_model
        if side == "query":
            return await in_turns([lambda t=text: model.aget_query_embedding(t) for text in texts], at_once)  # type: ignore[misc]
        size = model.embed_batch_size
        batches = [texts[i : i + size] for i in range(0, len(texts), size)]
        made = await in_turns([lambda b=batch: model.aget_text_embedding_batch(b) for batch in batches], at_once)  # type: ignore[misc]
        return [vector for vectors in made for vector in vectors]


async def in_turns(calls: Sequence[Callable[[], Awaitable[_T]]], at_once: int) -> list[_T]:
    """Results of asynchronous calls in their order, so many under way at once; the first error stops the others."""
    turns = asyncio.Semaphore(at_once)

    async def in_turn(call: Callable[[], Awaitable[_T]]) -> _T:
        async with turns:
            return await call()

    tasks = [asyncio.ensure_future(in_turn(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def checked_workers(num_workers: Any) -> int | None:
    """`num_workers`, if it is None or a positive number.

    Raises:
        ConfigError: It is neither.
    """
    if num_workers is not None and not is_int(num_workers, 1):
        raise ConfigError(f"num_workers={num_workers!r}", "None or a number above 0", "num_workers=4")
    workers: int | None = num_workers
    return workers


def _one_length(vectors: Sequence[Any]) -> FloatArray:
    if len(lengths := {len(vector) for vector in vectors}) > 1:
        raise _differing(sorted(lengths))
    return np.asarray(vectors, dtype=np.float32)


def _differing(lengths: Sequence[int]) -> ConfigError:
    return ConfigError(
        f"vectors of different dimensions ({', '.join(map(str, lengths[:5]))})",
        "one number of dimensions",
        "The embedding model gives texts vectors that cannot be compared; look at its settings.",
    )
