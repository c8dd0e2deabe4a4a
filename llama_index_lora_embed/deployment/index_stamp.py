"""Index stamps: record which embedding model built an index, and refuse to query it with another one."""

from __future__ import annotations

import inspect
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llama_index.core.vector_stores.simple import DEFAULT_VECTOR_STORE

from llama_index_lora_embed.config import STAMP_ID
from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError, WrongIndexError, warn_user
from llama_index_lora_embed.core.files import absolute, whole_file
from llama_index_lora_embed.embedding.adapter_embedding import AdapterEmbeddingModel
from llama_index_lora_embed.embedding.identity import passage_fingerprint
from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

STAMP_NAME = "lora_embed_stamp.json"
"""File beside a persisted `StorageContext` whose vector store is not a `SimpleVectorStore`."""
_KEY = "lora_embed_stamp"


@dataclass(frozen=True)
class IndexStamp:
    """The embedding model that an index was built with.

    Attributes:
        fingerprint: The model's `passage_fingerprint`; for models without one a digest of their class and settings.
        model_name: Path, Hub id or name of the model.
        dimensions: Length of its vectors.
        created: When the index was stamped; UTC, ISO 8601.
        trained: When the adapter was trained; empty if unknown.
        model_class: Name of the model's class; empty if unknown.
    """

    fingerprint: str
    model_name: str
    dimensions: int
    created: str
    trained: str = ""
    model_class: str = ""

    @classmethod
    def of(cls, embed_model: BaseEmbedding) -> IndexStamp:
        """The stamp for an index that is built with this model now; embeds one short text."""
        if isinstance(embed_model, AdapterEmbeddingModel) and not embed_model.is_bridge:
            # its passages are those of the model below
            return cls.of(embed_model.base_embed_model)
        manifest = embed_model.manifest if isinstance(embed_model, LoraEmbedding) else None
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        dimensions = len(embed_model.get_text_embedding("dimensions"))
        trained = "" if manifest is None else manifest.created
        kind = type(embed_model).__name__
        return cls(passage_fingerprint(embed_model), embed_model.model_name, dimensions, now, trained, kind)

    def differs(self, other: IndexStamp) -> bool:
        """Whether the two stamps belong to different models."""
        return (self.fingerprint, self.dimensions) != (other.fingerprint, other.dimensions)

    def check(self, model: IndexStamp) -> None:
        """Check that a model, by its stamp, is the one that built the index of this stamp.

        Raises:
            WrongIndexError: It is another one.
        """
        if self.differs(model):
            raise WrongIndexError(
                f"an index that was built on {self.created} with {self}, and the embedding model {model}",
                "the embedding model that built the index, because vectors of two models cannot be compared",
                "Query the index with that model, or rebuild it: delete the old vectors (or use a new collection or "
                "folder), index = VectorStoreIndex(nodes, embed_model=embed_model), then stamp_index(index, "
                "embed_model, replace=True).",
            )

    def may_be(self, other: IndexStamp) -> bool:
        """Whether two classes may have computed the same vectors: they name one model, and its dimensions are equal.

        Their fingerprints cannot be compared: one is a digest of weights, another of the settings of the class.
        """
        (name, dimensions, cls), (other_name, other_dimensions, other_cls) = (
            (absolute(stamp.model_name), stamp.dimensions, stamp.model_class) for stamp in (self, other)
        )
        return (name, dimensions) == (other_name, other_dimensions) and bool(cls and other_cls) and cls != other_cls

    def to_json(self) -> str:
        """The stored form."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: Any) -> IndexStamp:
        """Read what `to_json` wrote.

        Raises:
            WrongIndexError: `text` is not a stamp.
        """
        try:
            data = json.loads(text)
            known = {"model_class": "", **data}  # earlier stamps name no class
            return cls(**{field.name: known[field.name] for field in fields(cls)})
        except (TypeError, ValueError, KeyError) as error:
            raise WrongIndexError(
                f"a stamp that cannot be read ({str(text)[:80]!r})",
                "a stamp written by stamp_index()",
                "Rebuild the index with the model that you want, and stamp the new index.",
            ) from error

    def __str__(self) -> str:
        trained = f", trained {self.trained}" if self.trained else ""
        return f"{self.model_name!r} (fingerprint {self.fingerprint[:12]}{trained}, {self.dimensions} dimensions)"


def stamp_index(target: Any, embed_model: BaseEmbedding, *, replace: bool = False) -> IndexStamp:
    """Record in an index which model its vectors come from. Call it after building, with the model that built it.

    The stamp is stored in the metadata of a Chroma or Qdrant collection; in the data of a `SimpleVectorStore`, which is
    persisted with it; in the folder of a persisted `StorageContext`; and in other vector stores, among them Qdrant
    before 1.16, as a node with a reserved id. The vector of that node is the negated vector of a text, so that searches
    rank it last: it is only returned by a search for more passages than the index holds, without text and with
    "lora_embed_stamp" among its metadata. `replace=True` moves such a stamp into the metadata of a Qdrant collection.

    Args:
        target: A LlamaIndex index, a vector store, a Chroma collection, or the folder of a persisted
            `StorageContext`.
        embed_model: Any LlamaIndex embedding model.
        replace: Overwrite the stamp, for example that of another model after rebuilding the index.

    Returns:
        The new stamp, or the existing one if it belongs to the same model.

    Raises:
        WrongIndexError: The index has the stamp of another model, and `replace` is False.
        ConfigError: `target` cannot hold a stamp.
        OutputDirectoryError: The folder cannot be written.
    """
    slot, stamp = _find_slot(target), IndexStamp.of(embed_model)
    text = slot.read()
    if text is not None and not replace:
        existing = IndexStamp.from_json(text)
        existing.check(stamp)
        return existing
    slot.write(stamp.to_json(), embed_model)
    return stamp


def read_index_stamp(target: Any) -> IndexStamp | None:
    """The stamp of an index; None if it has none.

    Raises:
        ConfigError: `target` cannot hold a stamp.
        WrongIndexError: The stamp is damaged.
    """
    text = _find_slot(target).read()
    return None if text is None else IndexStamp.from_json(text)


def verify_index(
    target: Any, embed_model: BaseEmbedding, *, without_stamp: Literal["warn", "raise", "ignore"] = "warn"
) -> IndexStamp | None:
    """Check that an index was built with this model, before querying it.

    Args:
        target: As for `stamp_index`.
        embed_model: The model that will embed the queries.
        without_stamp: What to do if the index was never stamped.

    Returns:
        The stamp of the index; None if it has none.

    Raises:
        WrongIndexError: The index was built with another model; or it has no stamp, and `without_stamp` is "raise".
        ConfigError: `target` cannot hold a stamp.
    """
    if without_stamp not in ("warn", "raise", "ignore"):
        raise ConfigError(f"without_stamp={without_stamp!r}", "'warn', 'raise' or 'ignore'", "'warn' is the default.")
    existing, stamp = read_index_stamp(target), IndexStamp.of(embed_model)
    if existing is None:
        problem = WrongIndexError(
            "an index without a stamp, so that the model of its vectors is unknown",
            f"the stamp of {stamp}",
            "If this model built the index, call stamp_index(index, embed_model). Otherwise rebuild the index.",
        )
        if without_stamp == "raise":
            raise problem
        if without_stamp == "warn":
            warn_user(str(problem))
    else:
        existing.check(stamp)
    return existing


class _Slot(Protocol):
    """Where one kind of index keeps its stamp."""

    def read(self) -> str | None: ...

    def write(self, text: str, embed_model: BaseEmbedding) -> None: ...


class _FolderSlot:
    """The folder of a persisted `StorageContext`.

    The stamp lies in the file of the `SimpleVectorStore`, so that persisting other vectors there removes it; without
    such a file it has a file of its own.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(
                f"{str(folder)!r}, which is not a folder", "the persist_dir of a StorageContext", "Check the path."
            )
        self.file = folder / STAMP_NAME
        self.vectors = folder / f"{DEFAULT_VECTOR_STORE}__vector_store.json"

    def _vector_store(self) -> dict[str, Any] | None:
        """Content of the vector store's file; None if it is not a `SimpleVectorStore`."""
        try:
            data = json.loads(self.vectors.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) and "embedding_dict" in data else None

    def read(self) -> str | None:
        if (store := self._vector_store()) is not None:
            return ((store.get("metadata_dict") or {}).get(STAMP_ID) or {}).get(_KEY)
        return self.file.read_text(encoding="utf-8") if self.file.exists() else None

    def write(self, text: str, embed_model: BaseEmbedding) -> None:
        file, content = self.file, text
        if (store := self._vector_store()) is not None:
            store["metadata_dict"] = {**(store.get("metadata_dict") or {}), STAMP_ID: {_KEY: text}}
            file, content = self.vectors, json.dumps(store)
        try:
            with whole_file(file) as stream:
                stream.write(content)
        except OSError as error:
            raise OutputDirectoryError(
                f"a folder {str(file.parent)!r} that cannot be written ({error})",
                "a writable folder, because the stamp is stored with the index",
                "Change its permissions, or persist the index elsewhere.",
            ) from error


class _ChromaSlot:
    """The metadata of a Chroma collection."""

    def __init__(self, collection: Any) -> None:
        if inspect.iscoroutinefunction(getattr(collection, "modify", None)):
            raise ConfigError(
                "an asynchronous Chroma collection",
                "a collection of a synchronous client",
                "chromadb.HttpClient opens the same collection.",
            )
        self.collection = collection

    def read(self) -> str | None:
        return (self.collection.metadata or {}).get(_KEY)

    def write(self, text: str, embed_model: BaseEmbedding) -> None:
        # Chroma refuses any mention of the distance function here, which cannot change
        kept = {k: v for k, v in (self.collection.metadata or {}).items() if not k.startswith("hnsw:")}
        self.collection.modify(metadata={**kept, _KEY: text})


class _SimpleSlot:
    """The metadata of a `SimpleVectorStore`; its search passes over entries without a vector."""

    def __init__(self, store: Any) -> None:
        self.metadata: dict[str, Any] = store.data.metadata_dict

    def read(self) -> str | None:
        return (self.metadata.get(STAMP_ID) or {}).get(_KEY)

    def write(self, text: str, embed_model: BaseEmbedding) -> None:
        self.metadata[STAMP_ID] = {_KEY: text}


class _NodeSlot:
    """A node in a vector store that keeps nodes with their metadata."""

    def __init__(self, store: Any) -> None:
        if not getattr(store, "stores_text", False):
            raise ConfigError(
                f"a {type(store).__name__}, which keeps vectors alone",
                "a vector store that keeps nodes with their metadata, a Chroma collection or a SimpleVectorStore",
                "Persist the index and stamp its folder: stamp_index(persist_dir, embed_model).",
            )
        self.store = store

    def read(self) -> str | None:
        try:
            found = self.store.get_nodes([STAMP_ID])
        except NotImplementedError as error:
            raise ConfigError(
                f"a {type(self.store).__name__}, which does not return nodes by id",
                "a vector store with get_nodes",
                "Keep the stamp in a folder of your own: stamp_index(folder, embed_model).",
            ) from error
        except Exception as error:  # the collection may not exist yet; each store has its own error for that
            if "not found" in str(error).lower() or "doesn't exist" in str(error).lower():
                return None
            raise
        return found[0].metadata.get(_KEY) if found else None

    def write(self, text: str, embed_model: BaseEmbedding) -> None:
        from llama_index.core.schema import TextNode

        away = [-value for value in embed_model.get_text_embedding("This entry says which model made the vectors.")]
        with suppress(NotImplementedError):  # some stores would keep both nodes
            self.store.delete_nodes([STAMP_ID])
        self.store.add([TextNode(id_=STAMP_ID, text="", metadata={_KEY: text}, embedding=away)])


class _QdrantSlot:
    """The metadata of a Qdrant collection; a node where client or server do not keep any (before 1.16)."""

    def __init__(self, store: Any) -> None:
        if store._client is None:
            raise ConfigError(
                "a QdrantVectorStore with an asynchronous client alone",
                "one with a synchronous client",
                "QdrantVectorStore(name, client=QdrantClient(...), aclient=...) opens the same collection.",
            )
        self.client, self.store, self.name = store._client, store, store.collection_name
        self.node = _NodeSlot(store)

    def _in_metadata(self) -> str | None:
        if not self.client.collection_exists(self.name):
            return None
        metadata = getattr(self.client.get_collection(self.name).config, "metadata", None)
        return (metadata or {}).get(_KEY)

    def read(self) -> str | None:
        return self._in_metadata() or self.node.read()

    def write(self, text: str, embed_model: BaseEmbedding) -> None:
        if not self.client.collection_exists(self.name):
            raise ConfigError(
                f"a Qdrant collection {self.name!r}, which does not exist",
                "an index with nodes",
                "Call stamp_index after VectorStoreIndex(nodes, ...) has built it.",
            )
        with suppress(Exception):  # each version of client and server that cannot has its own error, or none at all
            self.client.update_collection(self.name, metadata={_KEY: text})
        if self._in_metadata() == text:
            self.store.delete_nodes([STAMP_ID])
        else:
            self.node.write(text, embed_model)


def _find_slot(target: Any) -> _Slot:
    from llama_index.core.vector_stores import SimpleVectorStore
    from llama_index.core.vector_stores.types import BasePydanticVectorStore

    if isinstance(target, (str, os.PathLike)):
        return _FolderSlot(Path(target))
    store = getattr(target, "vector_store", target)  # of an index
    collection = getattr(store, "_collection", store)  # of a ChromaVectorStore
    if type(collection).__module__.startswith("chromadb."):
        return _ChromaSlot(collection)
    if isinstance(store, SimpleVectorStore):
        return _SimpleSlot(store)
    if isinstance(store, BasePydanticVectorStore):
        return _QdrantSlot(store) if store.class_name() == "QdrantVectorStore" else _NodeSlot(store)
    raise ConfigError(
        f"a {type(target).__name__} to be stamped",
        "an index, a vector store, a Chroma collection or the folder of a persisted StorageContext",
        "stamp_index(index, embed_model)",
    )
