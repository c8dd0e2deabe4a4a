"""Vectors of any LlamaIndex embedding model: some texts at a time, many requests at once, kept on disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from tqdm.auto import tqdm

from llama_index_lora_embed.data.vector_files import read_vectors, texts_digest, write_vectors
from llama_index_lora_embed.errors import ConfigError
from llama_index_lora_embed.evaluation.search import FloatArray

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_AT_ONCE = 1024  # texts whose vectors are Python lists at one time, and that are kept together
# what does not decide a vector, and what must not be written down, by a part of its name
_NOT_IDENTITY = re.compile(
    r"key|token$|secret|password|auth|header|credential|timeout|retries|batch_size|num_workers|callback|cache|client"
    r"|limiter|base_url|endpoint|progress",
    re.IGNORECASE,
)

_T = TypeVar("_T")
Side = Literal["query", "passage"]


class VectorMaker:
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
        if num_workers is not None and (
            isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1
        ):
            raise ConfigError(f"num_workers={num_workers!r}", "None or a number above 0", "num_workers=4")
        self.embed_model = embed_model
        self.num_workers = num_workers
        self.show_progress = show_progress
        self.folder = None if cache_folder is None else Path(cache_folder) / identity(embed_model)

    def queries(self, texts: list[str]) -> FloatArray:
        """Vectors of queries, [texts, dimensions]."""
        return self._vectors(texts, "query")

    def passages(self, texts: list[str]) -> FloatArray:
        """Vectors of passages, [texts, dimensions]."""
        return self._vectors(texts, "passage")

    def _vectors(self, texts: list[str], side: Side) -> FloatArray:
        parts: list[FloatArray] = []
        with tqdm(total=len(texts), desc=f"{side} vectors", disable=not self.show_progress) as bar:
            for start in range(0, len(texts), _AT_ONCE):
                part = texts[start : start + _AT_ONCE]
                file = None if self.folder is None else self.folder / f"{side}-{texts_digest(part)}.npy"
                vectors = None if file is None else read_vectors(file, len(part))
                if vectors is None:
                    vectors = as_array(self._make(part, side))
                    if file is not None and np.isfinite(vectors).all():
                        write_vectors(file, vectors)
                parts.append(vectors)
                bar.update(len(part))
        return as_array([row for part in parts for row in part]) if _differ(parts) else np.concatenate(parts)

    def _make(self, texts: list[str], side: Side) -> list[list[float]]:
        model = self.embed_model
        if self.num_workers is not None:
            return run_to_end(self._make_async(texts, side))
        if side == "passage":
            return model.get_text_embedding_batch(texts)
        batch: Callable[[list[str]], list[list[float]]] | None = getattr(model, "get_query_embedding_batch", None)
        return [model.get_query_embedding(text) for text in texts] if batch is None else batch(texts)

    async def _make_async(self, texts: list[str], side: Side) -> list[list[float]]:
        model, turns = self.embed_model, asyncio.Semaphore(self.num_workers or 1)

        async def in_turn(made: Callable[[], Awaitable[_T]]) -> _T:
            async with turns:
                return await made()

        if side == "query":
            return await asyncio.gather(*(in_turn(lambda t=text: model.aget_query_embedding(t)) for text in texts))  # type: ignore[misc]
        size = model.embed_batch_size
        batches = [texts[i : i + size] for i in range(0, len(texts), size)]
        made = await asyncio.gather(*(in_turn(lambda b=batch: model.aget_text_embedding_batch(b)) for batch in batches))  # type: ignore[misc]
        return [vector for vectors in made for vector in vectors]


def identity(embed_model: BaseEmbedding) -> str:
    """Hexadecimal digits that stand for all that decides a model's vectors, as far as it tells.

    That is its `fingerprint` if it has one, as `LoraEmbedding` has. Of others it is a digest of their settings without
    keys, addresses and whatever only concerns speed, and of names, sizes and times of the files where `model_name` is
    a folder.
    """
    own = getattr(embed_model, "fingerprint", None)
    if isinstance(own, str) and re.fullmatch(r"[0-9a-f]{16,}", own):
        return own
    settings = {k: v for k, v in embed_model.to_dict().items() if not _NOT_IDENTITY.search(k)}
    folder = Path(embed_model.model_name)
    files: list[Any] = []
    if folder.is_dir():
        stats = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
        files = [[str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    text = json.dumps([settings, files], sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def as_array(vectors: Sequence[Any]) -> FloatArray:
    """Vectors as one array, [vectors, dimensions].

    Raises:
        ConfigError: They differ in length.
    """
    lengths = Counter(len(vector) for vector in vectors)
    if len(lengths) > 1:
        shown = ", ".join(f"{count} of {length}" for length, count in lengths.most_common(5))
        raise ConfigError(
            f"vectors of different dimensions ({shown})",
            "one number of dimensions",
            "The embedding model gives texts vectors that cannot be compared; look at its settings.",
        )
    return np.asarray(vectors, dtype=np.float32)


def _differ(parts: list[FloatArray]) -> bool:
    return len({part.shape[1] for part in parts}) > 1


def run_to_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, also where an event loop is running already, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
