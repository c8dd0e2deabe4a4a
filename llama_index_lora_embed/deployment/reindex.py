"""From one model's index to the next one's: built alongside, judged, switched at once, and back again."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llama_index_lora_embed.config.base import is_int, is_share
from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError, WrongIndexError
from llama_index_lora_embed.core.files import write_json
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.deployment.index_stamp import stamp_index, verify_index
from llama_index_lora_embed.deployment.registry import TOLERANCE
from llama_index_lora_embed.evaluation import (
    RetrievalComparison,
    RetrievalEvaluation,
    compare_retrieval,
    evaluate_index,
)

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import BaseNode

_POINTER = "current"
_TOP_K = 10
_NAME = re.compile(r"v-\d{8}-\d{6}-\d{6}-[\w]{1,8}(-\d+)?")  # what `_new_name` makes, and nothing of anybody else's


class IndexStore(Protocol):
    """Where the versions of an index are, and which of them is in use."""

    def read(self) -> dict[str, str]:
        """{"current": a version, "previous": the one before}, as far as there are any."""
        ...

    def write(self, pointer: dict[str, str]) -> None:
        """Change both at once."""
        ...

    def build(self, version: str, nodes: Sequence[BaseNode], embed_model: BaseEmbedding) -> VectorStoreIndex:
        """An index of its own, stamped when it is whole."""
        ...

    def open(self, version: str, embed_model: BaseEmbedding) -> VectorStoreIndex:
        """A version that was built, whose stamp is this model's."""
        ...

    def versions(self) -> list[str]:
        """All that are there, whole or not, the oldest first."""
        ...

    def remove(self, version: str) -> None:
        """Delete a version."""
        ...


class FolderIndexStore:
    """Versions of an index as persisted `StorageContext`s in a folder, and a file that names the one in use.

    Args:
        folder: Made when the first version is built.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._pointer = self.folder / f"{_POINTER}.json"

    def read(self) -> dict[str, str]:
        """As `IndexStore` has it."""
        try:
            pointer: dict[str, str] = json.loads(self._pointer.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValueError as error:
            raise WrongIndexError(
                f"an unreadable {str(self._pointer)!r} ({error})", 'JSON with "current" in it', "Name a version in it."
            ) from error
        return pointer

    def write(self, pointer: dict[str, str]) -> None:
        """As `IndexStore` has it."""
        try:
            write_json(self._pointer, pointer)
        except OSError as error:
            raise self._unwritable(error) from error

    def build(self, version: str, nodes: Sequence[BaseNode], embed_model: BaseEmbedding) -> VectorStoreIndex:
        """As `IndexStore` has it."""
        from llama_index.core import VectorStoreIndex

        index = VectorStoreIndex(_bare(nodes), embed_model=embed_model)
        try:
            index.storage_context.persist(persist_dir=str(self.folder / version))
        except OSError as error:
            raise self._unwritable(error) from error
        stamp_index(self.folder / version, embed_model)
        return index

    def open(self, version: str, embed_model: BaseEmbedding) -> VectorStoreIndex:
        """As `IndexStore` has it."""
        from llama_index.core import StorageContext, load_index_from_storage

        verify_index(self.folder / version, embed_model, without_stamp="raise")
        context = StorageContext.from_defaults(persist_dir=str(self.folder / version))
        index: Any = load_index_from_storage(context, embed_model=embed_model)
        return index  # type: ignore[no-any-return]

    def versions(self) -> list[str]:
        """As `IndexStore` has it."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def remove(self, version: str) -> None:
        """As `IndexStore` has it."""
        shutil.rmtree(self.folder / version, ignore_errors=True)

    def _unwritable(self, error: OSError) -> OutputDirectoryError:
        return OutputDirectoryError(
            f"an index folder {str(self.folder)!r} that cannot be written ({error})",
            "a folder that can, with room",
            "Change its permissions, or name another.",
        )


class ChromaIndexStore:
    """Versions of an index as Chroma collections `<name>.<version>`, and an empty one that names the one in use.

    Args:
        client: `chromadb.PersistentClient(...)` or `chromadb.HttpClient(...)`.
        name: Of the index; letters, digits, "_" and "-".

    Raises:
        ConfigError: The name is not allowed.
        MissingExtraError: The extra "chroma" is not installed.
    """

    def __init__(self, client: Any, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{1,100}", name):
            raise ConfigError(f"name={name!r}", "letters, digits, '_' and '-'", 'ChromaIndexStore(client, "handbook")')
        self._vector_store = require("llama_index.vector_stores.chroma").ChromaVectorStore
        self.client, self.name = client, name

    def read(self) -> dict[str, str]:
        """As `IndexStore` has it."""
        pointer = f"{self.name}.{_POINTER}"
        if pointer not in self._names():
            return {}
        held = self.client.get_collection(pointer).metadata or {}
        return {key: held[key] for key in ("current", "previous") if held.get(key)}

    def write(self, pointer: dict[str, str]) -> None:
        """As `IndexStore` has it; one transaction of Chroma's."""
        collection = self.client.get_or_create_collection(f"{self.name}.{_POINTER}")
        collection.modify(metadata={"current": "", "previous": "", **pointer})

    def build(self, version: str, nodes: Sequence[BaseNode], embed_model: BaseEmbedding) -> VectorStoreIndex:
        """As `IndexStore` has it."""
        from llama_index.core import StorageContext, VectorStoreIndex

        collection = self.client.create_collection(
            f"{self.name}.{version}", configuration={"hnsw": {"space": "cosine"}}
        )
        context = StorageContext.from_defaults(vector_store=self._vector_store(chroma_collection=collection))
        index = VectorStoreIndex(_bare(nodes), storage_context=context, embed_model=embed_model)
        stamp_index(collection, embed_model)
        return index

    def open(self, version: str, embed_model: BaseEmbedding) -> VectorStoreIndex:
        """As `IndexStore` has it."""
        from llama_index.core import VectorStoreIndex

        collection = self.client.get_collection(f"{self.name}.{version}")
        verify_index(collection, embed_model, without_stamp="raise")
        return VectorStoreIndex.from_vector_store(
            self._vector_store(chroma_collection=collection), embed_model=embed_model
        )

    def versions(self) -> list[str]:
        """As `IndexStore` has it."""
        start = f"{self.name}."
        versions = (name[len(start) :] for name in self._names() if name.startswith(start))
        return sorted(version for version in versions if _NAME.fullmatch(version))

    def remove(self, version: str) -> None:
        """As `IndexStore` has it."""
        self.client.delete_collection(f"{self.name}.{version}")

    def _names(self) -> list[str]:
        return [collection.name for collection in self.client.list_collections()]


@dataclass(frozen=True)
class Reindexed:
    """What `reindex` did.

    Attributes:
        index: The new index.
        version: What it is called.
        previous: The version that was in use before; None if there was none.
        switched: Whether the new one is in use now.
        comparison: Both, as they answer; None if they were not compared.
        reason: In one sentence.
    """

    index: VectorStoreIndex
    version: str
    previous: str | None
    switched: bool
    comparison: RetrievalComparison | None
    reason: str

    def __str__(self) -> str:
        return f"{'switched' if self.switched else 'NOT SWITCHED'} to {self.version}: {self.reason}"


def reindex(
    place: IndexStore | str | os.PathLike[str],
    nodes: Sequence[BaseNode],
    embed_model: BaseEmbedding,
    *,
    dataset: EmbeddingQAFinetuneDataset | None = None,
    before: BaseEmbedding | None = None,
    tolerance: float = TOLERANCE,
    keep: int = 2,
) -> Reindexed:
    """Build an index with a new model beside the one in use, compare both, and switch if the new one is no worse.

    Whoever opens the place with `open_index` gets the old index until the switch and the new one from then on. A run
    that is killed leaves the old one in use; what it had built is removed by a later one.

    Args:
        place: A folder, or a `ChromaIndexStore`.
        nodes: Everything that the index is to hold.
        embed_model: The new model.
        dataset: Questions about these nodes, by their ids; None switches without asking.
        before: The model of the index in use, to ask it with; needed with `dataset` once there is one.
        tolerance: nDCG@10 that the new index may lose: no part of the 95 % interval of the difference must lie
            below it (`RunRegistry.gate` has the same rule).
        keep: Versions that stay, the one in use and the one before among them.

    Returns:
        The new index, and whether it is in use. If not, it is kept all the same, so that one can look at it.

    Raises:
        ConfigError: There are no nodes, `before` is missing, or a number is out of bounds.
        DatasetError: The dataset is inconsistent, or about other nodes.
        OutputDirectoryError: The folder cannot be written.
        WrongIndexError: `before` is not the model of the index in use, or another run has switched meanwhile.

    Example:
        >>> done = reindex("runs/index", nodes, new, dataset=val, before=old)  # doctest: +SKIP
        >>> index = open_index("runs/index", new if done.switched else old)  # doctest: +SKIP
    """
    where = _place(place)
    if not nodes:
        raise ConfigError("no nodes to index", "one or more", "reindex(place, nodes, embed_model)")
    if not is_share(tolerance):
        raise ConfigError(f"tolerance={tolerance!r}", "a number from 0 to 1", f"tolerance={TOLERANCE}")
    if not is_int(keep, 2):
        raise ConfigError(f"keep={keep!r}", "2 or more: the one in use and the one to go back to", "keep=2")
    if dataset is not None:
        dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check("evaluation dataset")
    current = where.read().get("current")
    judged = None
    if dataset is not None and current is not None:
        if before is None:
            raise ConfigError(
                "a dataset without the model of the index in use", "both", "reindex(..., dataset=val, before=old_model)"
            )
        # before anything is built: it may know other nodes than the dataset
        judged = _judged(where.open(current, before), dataset)
    version = _new_name(where, str(getattr(embed_model, "fingerprint", None) or "model"))
    index = where.build(version, nodes, embed_model)
    comparison, switch, reason = None, True, "not compared with what was in use"
    if current is None:
        reason = "nothing was in use before"
    elif judged is not None and dataset is not None:
        comparison = compare_retrieval(judged, _judged(index, dataset), dataset, names=("in use", "new"))
        low, high = comparison.comparison.interval
        switch = low >= -tolerance
        reason = (
            f"nDCG@10 {comparison.comparison.difference:+.3f} (95 % interval {low:+.3f} to {high:+.3f}) beside "
            f"{current}; at most {tolerance:.3f} may be lost"
        )
    if switch:
        if where.read().get("current") != current or version not in where.versions():
            raise WrongIndexError(
                "an index that another reindex has switched meanwhile",
                f"{current!r} in use, as when this one began",
                "Run one at a time; nothing was switched by this one.",
            )
        where.write({"current": version, **({"previous": current} if current else {})})
    _tidy(where, keep, version, current)
    return Reindexed(index, version, current, switch, comparison, reason)


def _judged(index: VectorStoreIndex, dataset: EmbeddingQAFinetuneDataset) -> RetrievalEvaluation:
    return evaluate_index(index.as_retriever(similarity_top_k=_TOP_K), dataset)


def open_index(place: IndexStore | str | os.PathLike[str], embed_model: BaseEmbedding) -> VectorStoreIndex:
    """The index that is in use, if it was built with this model.

    Args:
        place: As for `reindex`.
        embed_model: What queries will be embedded with.

    Raises:
        ConfigError: No index was built there.
        WrongIndexError: It is of another model; the message names both.
    """
    where = _place(place)
    current = where.read().get("current")
    if current is None:
        raise ConfigError("a place without an index in use", "what reindex has built", "reindex(place, nodes, model)")
    return where.open(current, embed_model)


def roll_back(place: IndexStore | str | os.PathLike[str]) -> str:
    """Put the version before into use again; once more, and it is the newer one.

    Args:
        place: As for `reindex`.

    Returns:
        The version that is in use now.

    Raises:
        ConfigError: There is none to go back to.
    """
    where = _place(place)
    pointer = where.read()
    current, previous = pointer.get("current"), pointer.get("previous")
    if current is None or previous is None or previous not in where.versions():
        raise ConfigError(
            "a place with no version before the one in use", "one that was switched", "reindex switches to a new one."
        )
    where.write({"current": previous, "previous": current})
    return previous


def _bare(nodes: Sequence[BaseNode]) -> list[BaseNode]:
    """Nodes without vectors: those that they have may be another model's, and an index would take them."""
    return [node.model_copy(update={"embedding": None}) for node in nodes]


def _place(place: Any) -> IndexStore:
    if isinstance(place, (str, os.PathLike)):
        return FolderIndexStore(place)
    if not all(
        callable(getattr(place, name, None)) for name in ("read", "write", "build", "open", "versions", "remove")
    ):
        raise ConfigError(
            f"a place of type {type(place).__name__}",
            "a folder or a ChromaIndexStore",
            'ChromaIndexStore(client, "handbook")',
        )
    found: IndexStore = place
    return found


def _new_name(place: IndexStore, fingerprint: str) -> str:
    """Names sort as they were made."""
    start = datetime.now(timezone.utc).strftime("v-%Y%m%d-%H%M%S-%f")
    name, number, there = f"{start}-{fingerprint[:8]}", 1, set(place.versions())
    while name in there:
        name, number = f"{start}-{fingerprint[:8]}-{number + 1}", number + 1
    return name


def _tidy(place: IndexStore, keep: int, newest: str, before: str | None) -> None:
    """Remove versions older than the one that was in use before, but for those to keep.

    What is newer may be another run's, which is building it; if that was killed, it is older the next time.
    """
    held = {*place.read().values(), newest}
    others = [version for version in place.versions() if version not in held and before and version < before]
    for version in others[: max(0, len(others) - max(0, keep - len(held)))]:
        place.remove(version)
