"""Which index was built by which model: stamp it, check it, refuse the wrong one."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.vector_stores.simple import DEFAULT_VECTOR_STORE

from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError, WrongIndexError, warn_user
from llama_index_lora_embed.core.files import whole_file
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

STAMP_NAME = "lora_embed_stamp.json"
"""File beside a persisted `StorageContext`."""
_KEY = "lora_embed_stamp"
# of one form for every store; some take nothing but UUIDs
_ENTRY = str(uuid.uuid5(uuid.NAMESPACE_URL, "llama-index-lora-embed/stamp"))
# what decides an embedding model's vectors in LlamaIndex's own classes, where it is not a `LoraEmbedding`
_DECIDING = (
    *("model_name", "deployment_name", "dimensions"),
    *("query_instruction", "text_instruction", "max_length", "normalize"),
)


@dataclass(frozen=True)
class IndexStamp:
    """Which model an index's vectors are of.

    Attributes:
        fingerprint: `LoraEmbedding.fingerprint`, or a digest of another embedding model's class and settings.
        model_name: Where it is, or what it is called.
        dimensions: Of its vectors.
        created: When the index was stamped; UTC, ISO 8601.
        trained: When the adapter was trained; empty where that is not known.
    """

    fingerprint: str
    model_name: str
    dimensions: int
    created: str
    trained: str = ""

    @classmethod
    def of(cls, embed_model: BaseEmbedding) -> IndexStamp:
        """The stamp that an index gets which is built with this model now."""
        trained = ""
        if isinstance(embed_model, LoraEmbedding):
            digest = str(embed_model.fingerprint)
            trained = embed_model.manifest.created if embed_model.manifest is not None else ""
        else:
            settings = {name: getattr(embed_model, name, None) for name in _DECIDING}
            kind = type(embed_model)
            text = json.dumps([kind.__module__, kind.__qualname__, settings], sort_keys=True, default=str)
            digest = hashlib.sha256(text.encode()).hexdigest()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(digest, embed_model.model_name, len(embed_model.get_text_embedding("dimensions")), now, trained)

    def differs(self, other: IndexStamp) -> bool:
        """Whether it is another model's."""
        return (self.fingerprint, self.dimensions) != (other.fingerprint, other.dimensions)

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: Any) -> IndexStamp:
        """What `to_json` made.

        Raises:
            WrongIndexError: It is none.
        """
        try:
            data = json.loads(text)
            return cls(**{field.name: data[field.name] for field in fields(cls)})
        except (TypeError, ValueError, KeyError) as error:
            raise WrongIndexError(
                f"a stamp that cannot be read ({str(text)[:80]!r})",
                "the stamp as stamp_index() wrote it",
                "Index again with the model that you mean, and stamp the new index.",
            ) from error

    def __str__(self) -> str:
        trained = f", trained {self.trained}" if self.trained else ""
        return f"{self.model_name!r} (fingerprint {self.fingerprint[:12]}{trained}, {self.dimensions} dimensions)"


def stamp_index(target: Any, embed_model: BaseEmbedding, *, replace: bool = False) -> IndexStamp:
    """Write into an index which model its vectors are of; when it is built, with the model that built it.

    Where it is written: a Chroma collection's metadata; the data of a `SimpleVectorStore`, which are persisted with it;
    a file in the folder of a persisted `StorageContext`; and in other vector stores an entry of their own, under a
    reserved id. That entry's vector is the opposite of a text's, so that no search finds it before the passages; a
    search for more passages than there are does.

    Args:
        target: A LlamaIndex index, a vector store, a Chroma collection, or the folder of a persisted
            `StorageContext`.
        embed_model: Any LlamaIndex embedding model.
        replace: Whether a stamp of another model may be replaced, after everything was indexed again.

    Returns:
        What was written, or what was there, if it is the same model's.

    Raises:
        WrongIndexError: There is a stamp of another model, and `replace` was not asked for.
        ConfigError: `target` cannot hold a stamp.
        OutputDirectoryError: The folder cannot be written.
    """
    place, made = _place_of(target), IndexStamp.of(embed_model)
    text = place.read()
    if text is not None and not replace:
        there = IndexStamp.from_json(text)
        if there.differs(made):
            raise _wrong(there, made)
        return there
    place.write(made.to_json(), embed_model)
    return made


def read_index_stamp(target: Any) -> IndexStamp | None:
    """An index's stamp; None if it has none.

    Raises:
        ConfigError: `target` cannot hold a stamp.
        WrongIndexError: The stamp is damaged.
    """
    text = _place_of(target).read()
    return None if text is None else IndexStamp.from_json(text)


def verify_index(
    target: Any, embed_model: BaseEmbedding, *, without_stamp: Literal["warn", "raise", "ignore"] = "warn"
) -> IndexStamp | None:
    """See that an index was built with this model, before it is asked with it.

    Args:
        target: As for `stamp`.
        embed_model: What queries will be embedded with.
        without_stamp: What to do where the index was never stamped.

    Returns:
        The index's stamp; None if it has none.

    Raises:
        WrongIndexError: It was built with another model, or has no stamp and should have.
        ConfigError: `target` cannot hold a stamp.
    """
    if without_stamp not in ("warn", "raise", "ignore"):
        raise ConfigError(f"without_stamp={without_stamp!r}", "'warn', 'raise' or 'ignore'", "'warn' is the default.")
    there, mine = read_index_stamp(target), IndexStamp.of(embed_model)
    if there is None:
        problem = WrongIndexError(
            "an index without a stamp, so that nobody knows which model its vectors are of",
            f"the stamp of {mine}",
            "If it was built with this model: stamp_index(index, embed_model). If not, index again.",
        )
        if without_stamp == "raise":
            raise problem
        if without_stamp == "warn":
            warn_user(str(problem))
    elif there.differs(mine):
        raise _wrong(there, mine)
    return there


def _wrong(there: IndexStamp, mine: IndexStamp) -> WrongIndexError:
    return WrongIndexError(
        f"an index that was built on {there.created} with {there}, and the embedding model {mine}",
        "the embedding model that it was built with: vectors of two models cannot be compared",
        "Ask it with that one, or index again: delete the old vectors (or take a new collection or folder), index = "
        "VectorStoreIndex(nodes, embed_model=embed_model), then stamp_index(index, embed_model, replace=True).",
    )


class _Folder:
    """A persisted `StorageContext`: its vector store's own file, or one beside it where that is none of LlamaIndex's.

    In the vector store's file the stamp goes where the vectors go: persisting other ones writes over both.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(
                f"{str(folder)!r}, which is no folder", "where a StorageContext was persisted", "Check it."
            )
        self.file = folder / STAMP_NAME
        self.vectors = folder / f"{DEFAULT_VECTOR_STORE}__vector_store.json"

    def _store(self) -> dict[str, Any] | None:
        """What the vector store's file holds; None if it is none of a `SimpleVectorStore`."""
        try:
            data = json.loads(self.vectors.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) and "embedding_dict" in data else None

    def read(self) -> str | None:
        if (store := self._store()) is not None:
            held = (store.get("metadata_dict") or {}).get(_ENTRY) or {}
            return held.get(_KEY)
        return self.file.read_text(encoding="utf-8") if self.file.exists() else None

    def write(self, text: str, embed_model: BaseEmbedding) -> None:
        if (store := self._store()) is not None:
            store["metadata_dict"] = {**(store.get("metadata_dict") or {}), _ENTRY: {_KEY: text}}
            _replace(self.vectors, json.dumps(store))
        else:
            _replace(self.file, text)


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        with whole_file(file) as stream:
            stream.write(text)
    except OSError as error:
        raise OutputDirectoryError(
            f"a folder {str(file.parent)!r} that cannot be written ({error})",
            "one that can: the stamp is kept with the index",
            "Change its permissions, or persist the index elsewhere.",
        ) from error


class _Chroma:
    """The metadata of a collection."""

    def __init__(self, collection: Any) -> None:
        self.collection = collection

    def read(self) -> str | None:
        return (self.collection.metadata or {}).get(_KEY)

    def write(self, text: str, embed_model: BaseEmbedding) -> None:
        # the distance cannot be changed, and Chroma refuses to be told it again
        kept = {k: v for k, v in (self.collection.metadata or {}).items() if not k.startswith("hnsw:")}
        self.collection.modify(metadata={**kept, _KEY: text})


class _Simple:
    """The data of a `SimpleVectorStore`; its searches go through vectors, of which the stamp has none."""

    def __init__(self, store: Any) -> None:
        self.metadata: dict[str, Any] = store.data.metadata_dict

    def read(self) -> str | None:
        return (self.metadata.get(_ENTRY) or {}).get(_KEY)

    def write(self, text: str, embed_model: BaseEmbedding) -> None:
        self.metadata[_ENTRY] = {_KEY: text}


class _Entry:
    """An entry of a vector store that keeps nodes with their metadata."""

    def __init__(self, store: Any) -> None:
        self.store = store
        if not getattr(store, "stores_text", False):
            raise ConfigError(
                f"a {type(store).__name__}, which keeps vectors alone",
                "a vector store that keeps nodes with their metadata, a Chroma collection or a SimpleVectorStore",
                "Persist the index and stamp its folder: stamp_index(persist_dir, embed_model).",
            )

    def read(self) -> str | None:
        try:
            found = self.store.get_nodes([_ENTRY])
        except NotImplementedError as error:
            raise ConfigError(
                f"a {type(self.store).__name__}, which does not give nodes by their ids",
                "a vector store with get_nodes",
                "Keep the stamp in a folder of yours: stamp_index(folder, embed_model).",
            ) from error
        except Exception as error:  # a collection that does not exist yet, in every store's own words
            if "not found" in str(error).lower() or "doesn't exist" in str(error).lower():
                return None
            raise
        return found[0].metadata.get(_KEY) if found else None

    def write(self, text: str, embed_model: BaseEmbedding) -> None:
        from llama_index.core.schema import TextNode

        away = [-value for value in embed_model.get_text_embedding("This entry says which model made the vectors.")]
        with suppress(NotImplementedError):  # some stores would keep two of them
            self.store.delete_nodes([_ENTRY])
        self.store.add([TextNode(id_=_ENTRY, text="", metadata={_KEY: text}, embedding=away)])


def _place_of(target: Any) -> _Folder | _Chroma | _Simple | _Entry:
    from llama_index.core.vector_stores import SimpleVectorStore
    from llama_index.core.vector_stores.types import BasePydanticVectorStore

    if isinstance(target, (str, os.PathLike)):
        return _Folder(Path(target))
    store = getattr(target, "vector_store", target)  # of an index
    collection = getattr(store, "_collection", store)  # of a ChromaVectorStore
    if type(collection).__module__.startswith("chromadb."):
        if inspect.iscoroutinefunction(getattr(collection, "modify", None)):
            raise ConfigError(
                "an asynchronous Chroma collection",
                "one of a synchronous client",
                "chromadb.HttpClient opens the same collection.",
            )
        return _Chroma(collection)
    if isinstance(store, SimpleVectorStore):
        return _Simple(store)
    if isinstance(store, BasePydanticVectorStore):
        return _Entry(store)
    raise ConfigError(
        f"a {type(target).__name__} to be stamped",
        "an index, a vector store, a Chroma collection or the folder of a persisted StorageContext",
        "stamp_index(index, embed_model)",
    )
