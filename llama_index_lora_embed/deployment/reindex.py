"""Replace an index by one of a new model: built beside the old one, evaluated, switched atomically, reversible."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from llama_index_lora_embed.config.base import is_int, is_share
from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError, WrongIndexError
from llama_index_lora_embed.core.files import write_json
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.deployment.index_stamp import stamp_index, verify_index
from llama_index_lora_embed.evaluation import (
    RetrievalComparison,
    RetrievalEvaluation,
    compare_retrieval,
    evaluate_index,
)
from llama_index_lora_embed.evaluation.verdict import TOLERANCE

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import BaseNode

_POINTER = "current"
_TOP_K = 10
_VERSION = re.compile(r"v-\d{8}-\d{6}-\d{6}-[\w]{1,8}(-\d+)?")  # the names of `_new_version`, never a user's files


@runtime_checkable
class IndexStore(Protocol):
    """Storage for the versions of one index, with a pointer to the version that is in use."""

    def read_pointer(self) -> dict[str, str]:
        """{"current": version in use, "previous": version before it}, without the keys that do not apply."""
        ...

    def write_pointer(self, pointer: dict[str, str]) -> None:
        """Change both atomically."""
        ...

    def build(self, version: str, nodes: Sequence[BaseNode], embed_model: BaseEmbedding) -> VectorStoreIndex:
        """Build a new version, and stamp it once it is complete."""
        ...

    def open(self, version: str, embed_model: BaseEmbedding) -> VectorStoreIndex:
        """Open a version after verifying its stamp."""
        ...

    def versions(self) -> list[str]:
        """All versions, complete or not, oldest first."""
        ...

    def remove(self, version: str) -> None:
        """Delete a version."""
        ...


class FolderIndexStore:
    """Index versions as persisted `StorageContext`s in a folder; `current.json` names the one in use.

    Args:
        folder: Created with the first version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._pointer = self.folder / f"{_POINTER}.json"

    def read_pointer(self) -> dict[str, str]:
        """See `IndexStore`."""
        try:
            pointer: dict[str, str] = json.loads(self._pointer.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValueError as error:
            raise WrongIndexError(
                f"an unreadable {str(self._pointer)!r} ({error})",
                'JSON with the key "current"',
                'Write {"current": "<version>"} into it.',
            ) from error
        return pointer

    def write_pointer(self, pointer: dict[str, str]) -> None:
        """See `IndexStore`."""
        try:
            write_json(self._pointer, pointer)
        except OSError as error:
            raise self._unwritable(error) from error

    def build(self, version: str, nodes: Sequence[BaseNode], embed_model: BaseEmbedding) -> VectorStoreIndex:
        """See `IndexStore`."""
        from llama_index.core import VectorStoreIndex

        index = VectorStoreIndex(_without_embeddings(nodes), embed_model=embed_model)
        try:
            index.storage_context.persist(persist_dir=str(self.folder / version))
        except OSError as error:
            raise self._unwritable(error) from error
        stamp_index(self.folder / version, embed_model)
        return index

    def open(self, version: str, embed_model: BaseEmbedding) -> VectorStoreIndex:
        """See `IndexStore`."""
        from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage

        verify_index(self.folder / version, embed_model, without_stamp="raise")
        context = StorageContext.from_defaults(persist_dir=str(self.folder / version))
        return cast(VectorStoreIndex, load_index_from_storage(context, embed_model=embed_model))

    def versions(self) -> list[str]:
        """See `IndexStore`."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if _VERSION.fullmatch(path.name))

    def remove(self, version: str) -> None:
        """See `IndexStore`."""
        shutil.rmtree(self.folder / version, ignore_errors=True)

    def _unwritable(self, error: OSError) -> OutputDirectoryError:
        return OutputDirectoryError(
            f"an index folder {str(self.folder)!r} that cannot be written ({error})",
            "a writable folder with free space",
            "Change its permissions, or choose another folder.",
        )


class ChromaIndexStore:
    """Index versions as Chroma collections `<name>.<version>`; the empty `<name>.current` names the one in use.

    Args:
        client: `chromadb.PersistentClient(...)` or `chromadb.HttpClient(...)`.
        name: Name of the index: letters, digits, "_" and "-".

    Raises:
        ConfigError: The name is not allowed.
        MissingExtraError: The extra "chroma" is not installed.
    """

    def __init__(self, client: Any, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{1,100}", name):
            raise ConfigError(f"name={name!r}", "letters, digits, '_' and '-'", 'ChromaIndexStore(client, "handbook")')
        self._vector_store = require("llama_index.vector_stores.chroma").ChromaVectorStore
        self.client, self.name = client, name

    def read_pointer(self) -> dict[str, str]:
        """See `IndexStore`."""
        pointer = f"{self.name}.{_POINTER}"
        if pointer not in self._collections():
            return {}
        metadata = self.client.get_collection(pointer).metadata or {}
        return {key: metadata[key] for key in ("current", "previous") if metadata.get(key)}

    def write_pointer(self, pointer: dict[str, str]) -> None:
        """See `IndexStore`; Chroma changes both in one transaction."""
        collection = self.client.get_or_create_collection(f"{self.name}.{_POINTER}")
        collection.modify(metadata={"current": "", "previous": "", **pointer})

    def build(self, version: str, nodes: Sequence[BaseNode], embed_model: BaseEmbedding) -> VectorStoreIndex:
        """See `IndexStore`."""
        from llama_index.core import StorageContext, VectorStoreIndex

        collection = self.client.create_collection(
            f"{self.name}.{version}", configuration={"hnsw": {"space": "cosine"}}
        )
        context = StorageContext.from_defaults(vector_store=self._vector_store(chroma_collection=collection))
        index = VectorStoreIndex(_without_embeddings(nodes), storage_context=context, embed_model=embed_model)
        stamp_index(collection, embed_model)
        return index

    def open(self, version: str, embed_model: BaseEmbedding) -> VectorStoreIndex:
        """See `IndexStore`."""
        from llama_index.core import VectorStoreIndex

        collection = self.client.get_collection(f"{self.name}.{version}")
        verify_index(collection, embed_model, without_stamp="raise")
        return VectorStoreIndex.from_vector_store(
            self._vector_store(chroma_collection=collection), embed_model=embed_model
        )

    def versions(self) -> list[str]:
        """See `IndexStore`."""
        names = (name.removeprefix(f"{self.name}.") for name in self._collections() if name.startswith(f"{self.name}."))
        return sorted(name for name in names if _VERSION.fullmatch(name))

    def remove(self, version: str) -> None:
        """See `IndexStore`."""
        self.client.delete_collection(f"{self.name}.{version}")

    def _collections(self) -> list[str]:
        return [collection.name for collection in self.client.list_collections()]


@dataclass(frozen=True)
class ReindexResult:
    """The outcome of `reindex`.

    Attributes:
        index: The new index.
        version: Its name in the store.
        previous: The version that was in use before; None if there was none.
        switched: Whether the new index is in use now.
        comparison: Retrieval with the old index against the new one; None if they were not compared.
        reason: Why it was switched or not, in one sentence.
    """

    index: VectorStoreIndex = field(repr=False)
    version: str
    previous: str | None
    switched: bool
    comparison: RetrievalComparison | None
    reason: str

    def __str__(self) -> str:
        return f"{'switched' if self.switched else 'NOT SWITCHED'} to {self.version}: {self.reason}"


def reindex(
    store: IndexStore | str | os.PathLike[str],
    nodes: Sequence[BaseNode],
    embed_model: BaseEmbedding,
    *,
    dataset: EmbeddingQAFinetuneDataset | None = None,
    before: BaseEmbedding | None = None,
    tolerance: float = TOLERANCE,
    keep: int = 2,
) -> ReindexResult:
    """Build an index with a new model beside the one in use, compare both, and switch if the new one is no worse.

    `open_index` returns the old index until the switch, and the new one afterwards. If the run is killed, the old index
    stays in use, and a later run removes what was half built.

    Args:
        store: A folder, or a `ChromaIndexStore`.
        nodes: The complete content of the new index.
        embed_model: The new model.
        dataset: Queries whose relevant passages are ids of these nodes; None switches without a comparison.
        before: The model of the index in use; required with `dataset` if there is such an index.
        tolerance: Accepted loss of nDCG@10: the new index is refused if the lower end of the 95 % interval of the
            difference is below -tolerance, and on synthetic queries unless it is LIKELY BETTER (`Comparison.accepts`).
        keep: Number of versions to keep, at least the one in use and the one before it.

    Returns:
        The new index, and whether it is in use. An index that was refused is kept for inspection.

    Raises:
        ConfigError: There are no nodes, `before` is missing, or a number is out of bounds.
        DatasetError: The dataset is inconsistent, or its passages are other nodes.
        OutputDirectoryError: The folder cannot be written.
        WrongIndexError: `before` is not the model of the index in use, or another run switched in the meantime.

    Example:
        >>> done = reindex("runs/index", nodes, new, dataset=val, before=old)  # doctest: +SKIP
        >>> index = open_index("runs/index", new if done.switched else old)  # doctest: +SKIP
    """
    store = _index_store(store)
    if not nodes:
        raise ConfigError("no nodes to index", "at least one", "reindex(store, nodes, embed_model)")
    if not is_share(tolerance):
        raise ConfigError(f"tolerance={tolerance!r}", "a number from 0 to 1", f"tolerance={TOLERANCE}")
    if not is_int(keep, 2):
        raise ConfigError(f"keep={keep!r}", "at least 2: the version in use and the one to roll back to", "keep=2")
    if dataset is not None:
        dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    current = store.read_pointer().get("current")
    old = None
    if dataset is not None and current is not None:
        if before is None:
            raise ConfigError(
                "a dataset without the model of the index in use", "both", "reindex(..., dataset=val, before=old_model)"
            )
        # evaluated before anything is built, because the old index may hold other nodes than the dataset
        old = _evaluate(store.open(current, before), dataset)
    version = _new_version(store, str(getattr(embed_model, "fingerprint", None) or "model"))
    index = store.build(version, nodes, embed_model)
    comparison, switch, reason = None, True, "not compared with the index in use"
    if current is None:
        reason = "there was no index in use"
    elif old is not None and dataset is not None:
        manifest = getattr(embed_model, "manifest", None)
        comparison = compare_retrieval(
            old,
            _evaluate(index, dataset),
            dataset,
            # the base was trained on none of them
            trained_on=() if manifest is None else manifest.trained_on,
            names=("in use", "new"),
        )
        same_model = getattr(before, "fingerprint", None) == getattr(embed_model, "fingerprint", "")
        switch = comparison.comparison.accepts(tolerance)
        if same_model:  # with other nodes; synthetic queries show that as well as others
            switch = comparison.comparison.interval[0] >= -tolerance
        reason = f"{comparison.comparison} Compared with {current}; the accepted loss is {tolerance:.3f}"
    if switch:
        if store.read_pointer().get("current") != current or version not in store.versions():
            raise WrongIndexError(
                "an index that another reindex() switched in the meantime",
                f"{current!r} in use, as at the start of this run",
                "Run one reindex() at a time; this run switched nothing.",
            )
        store.write_pointer({"current": version, **({"previous": current} if current else {})})
    _remove_old_versions(store, keep, version, current)
    return ReindexResult(index, version, current, switch, comparison, reason)


def open_index(store: IndexStore | str | os.PathLike[str], embed_model: BaseEmbedding) -> VectorStoreIndex:
    """Open the index that is in use, after verifying its stamp.

    Args:
        store: As for `reindex`.
        embed_model: The model that will embed the queries.

    Raises:
        ConfigError: The store has no index in use.
        WrongIndexError: The index was built with another model; the message names both.
    """
    store = _index_store(store)
    current = store.read_pointer().get("current")
    if current is None:
        raise ConfigError(
            "a store without an index in use", "an index built by reindex()", "reindex(store, nodes, embed_model)"
        )
    return store.open(current, embed_model)


def roll_back(store: IndexStore | str | os.PathLike[str]) -> str:
    """Put the previous version into use again; a second call undoes the first.

    Args:
        store: As for `reindex`.

    Returns:
        The version that is in use now.

    Raises:
        ConfigError: There is no previous version.
    """
    store = _index_store(store)
    pointer = store.read_pointer()
    current, previous = pointer.get("current"), pointer.get("previous")
    if current is None or previous is None or previous not in store.versions():
        raise ConfigError("a store without a previous version", "two versions", "reindex() switches to a new version.")
    store.write_pointer({"current": previous, "previous": current})
    return previous


def _evaluate(index: VectorStoreIndex, dataset: EmbeddingQAFinetuneDataset) -> RetrievalEvaluation:
    return evaluate_index(index.as_retriever(similarity_top_k=_TOP_K), dataset)


def _without_embeddings(nodes: Sequence[BaseNode]) -> list[BaseNode]:
    """Copies without embeddings: an index would keep those of another model."""
    return [node.model_copy(update={"embedding": None}) for node in nodes]


def _index_store(store: Any) -> IndexStore:
    if isinstance(store, (str, os.PathLike)):
        return FolderIndexStore(store)
    if not isinstance(store, IndexStore):
        raise ConfigError(
            f"a store of type {type(store).__name__}",
            "a folder or a ChromaIndexStore",
            'ChromaIndexStore(client, "handbook")',
        )
    return store


def _new_version(store: IndexStore, fingerprint: str) -> str:
    """A new name; names sort by time."""
    start = f"{datetime.now(timezone.utc):v-%Y%m%d-%H%M%S-%f}-{fingerprint[:8]}"
    name, number, taken = start, 1, set(store.versions())
    while name in taken:
        number += 1
        name = f"{start}-{number}"
    return name


def _remove_old_versions(store: IndexStore, keep: int, newest: str, before: str | None) -> None:
    """Remove all but `keep` versions, never one that is newer than `before`: another run may still be building it."""
    held = {*store.read_pointer().values(), newest}
    others = [version for version in store.versions() if version not in held and before and version < before]
    for version in others[: max(0, len(others) - max(0, keep - len(held)))]:
        store.remove(version)
