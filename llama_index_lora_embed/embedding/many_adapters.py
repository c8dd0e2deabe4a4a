"""The part of `LoraEmbedding` that holds many adapters on one base."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.tokens import check_texts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from typing_extensions import Self

    from llama_index_lora_embed.embedding.adapter_pool import Adapter
    from llama_index_lora_embed.models.adapter_directory import Manifest


class ManyAdapters(BaseEmbedding):
    """What `LoraEmbedding` does with `adapters`; its fields are described there."""

    adapters: dict[str, str] | None = Field(default=None, description="Adapters by name, as folders or Hub ids.")
    adapter: str | None = Field(default=None, frozen=True, description="Name of the adapter that vectors are of.")
    max_adapters: int = Field(default=32, ge=1, description="Adapters to hold in memory.")
    adapter_scale: float = Field(
        default=1.0, ge=0.0, le=1.0, frozen=True, description="What adapters are multiplied by."
    )
    base_model: str | None = Field(default=None, description="Folder or Hub id of the base.")
    fingerprint: str | None = Field(default=None, description="Digest of all that decides the vectors.")
    revision: str | None = Field(default=None, description="Commit on the Hub.")
    cache_folder: str | None = Field(default=None, description="Cache of huggingface_hub.")
    query_prompt: str | None = Field(default=None, description="Overrides the query prompt.")
    passage_prompt: str | None = Field(default=None, description="Overrides the passage prompt.")

    _shared: Any = PrivateAttr(default=None)
    _known: dict[str, Adapter] = PrivateAttr(default_factory=dict)
    _lock: Any = PrivateAttr(default_factory=threading.RLock)

    if TYPE_CHECKING:  # what `LoraEmbedding` has

        def _ready(self) -> SentenceTransformer: ...

        def _base_loading(self) -> dict[str, Any]: ...

        def _take(self, model: SentenceTransformer, manifest: Manifest | None, digest: str) -> None: ...

        def _encode_with(self, texts: list[str], adapters: list[Adapter | None], *, query: bool) -> list[Embedding]: ...

    def list_adapters(self) -> list[str]:
        """Names of the adapters that texts can name; none where there is only one, merged."""
        return list(self.adapters or {})

    def add_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Have one more adapter; its weights are loaded when a text first names it.

        Args:
            name: Not taken yet.
            path: Folder or Hub id.

        Raises:
            ConfigError: The name is taken; this object was made without `adapters`; or it is not plain LoRA.
            ModelNotFoundError: It is not there.
            AdapterError: It is damaged.
            BaseModelMismatchError: It was trained on another base.
        """
        with self._lock:
            self._several()
            if name in self._known:
                raise ConfigError(
                    f"a second adapter named {name!r}",
                    f"a name that is not among {_listed(self._known)}",
                    f"remove_adapter({name!r}) first.",
                )
            found = checked_names({name: path})[name]
            known = self._describe(found)
            self.adapters, self._known = {**(self.adapters or {}), name: found}, {**self._known, name: known}

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory, once calls that are using it have ended.

        Raises:
            ConfigError: There is none of this name, or it is the one that this object's vectors are of.
        """
        with self._lock:
            shared, gone = self._several(), self._by_name(name)
            if name == self.adapter:
                raise ConfigError(
                    f"{name!r} removed from the embedding model whose vectors it makes",
                    "an adapter that is not in use",
                    "Remove it from the object that with_adapter() was called on.",
                )
            self.adapters = {other: path for other, path in (self.adapters or {}).items() if other != name}
            self._known = {other: adapter for other, adapter in self._known.items() if other != name}
            if gone not in self._known.values():
                shared.unload(gone)

    def with_adapter(self, name: str | None) -> Self:
        """An embedding model of one of the adapters, or of the base (None), that shares this one's base in memory.

        Adapters that are added or removed afterwards are so here or there, not in both.

        Raises:
            ConfigError: There is none of this name.
        """
        with self._lock:
            self._several()
            own = None if name is None else self._by_name(name)
            view = self.__deepcopy__()
            view.__dict__["adapter"] = name
            view.fingerprint = None
            view.model_name = self._shared.base.model_id if own is None else str((self.adapters or {})[str(name)])
            # which no copy takes along
            view.callback_manager, view.rate_limiter = self.callback_manager, self.rate_limiter
            view._shared, view._known = self._shared, self._known
        view._take_several()
        return view

    def get_mixed_embeddings(
        self, texts: Sequence[str], adapters: Sequence[str | None], *, kind: Literal["text", "query"] = "text"
    ) -> list[Embedding]:
        """Vectors of texts, each with the adapter that it names, computed together.

        Args:
            texts: Any number.
            adapters: For each text a name, or None for the base.
            kind: Which prompt texts stand under: that of passages, or that of queries.

        Returns:
            A vector for each text.

        Raises:
            ConfigError: A name is unknown, there are not as many names as texts, or a text is no string.
        """
        checked = check_texts(texts)
        self._several()
        if isinstance(adapters, str) or len(adapters) != len(checked):
            got = repr(adapters) if isinstance(adapters, str) else f"{len(adapters)} names"
            raise ConfigError(f"{got} for {len(checked)} texts", "a name or None for each text", "Name each one's.")
        if kind not in ("text", "query"):
            raise ConfigError(f"kind={kind!r}", "'text' or 'query'", "Which prompt do the texts stand under?")
        with self._lock:
            chosen = [None if name is None else self._by_name(name) for name in adapters]
        return self._encode_with(checked, chosen, query=kind == "query")

    async def aget_mixed_embeddings(
        self, texts: Sequence[str], adapters: Sequence[str | None], *, kind: Literal["text", "query"] = "text"
    ) -> list[Embedding]:
        """`get_mixed_embeddings`, in a thread."""
        return await asyncio.to_thread(self.get_mixed_embeddings, texts, adapters, kind=kind)

    def _several(self) -> Any:
        """The shared base.

        Raises:
            ConfigError: This object has one adapter or none.
        """
        self._ready()
        if self._shared is None:
            raise ConfigError(
                "an embedding model with one adapter, merged into its base",
                "one that was made to hold several",
                'LoraEmbedding(adapters={"legal": "runs/legal", "hr": "runs/hr"}), or adapters={} with base_model=.',
            )
        return self._shared

    def _by_name(self, name: Any) -> Adapter:
        if name not in self._known:
            raise ConfigError(
                f"an adapter named {name!r}", f"one of {_listed(self._known)}", "add_adapter(name, path) adds one."
            )
        adapter: Adapter = self._known[name]
        return adapter

    def _own(self) -> Adapter | None:
        return None if self.adapter is None else self._by_name(self.adapter)

    def _describe(self, path: str) -> Adapter:
        adapter: Adapter = self._shared.describe(
            path, cache_folder=self.cache_folder, prompts=self._prompts(), scale=self.adapter_scale
        )
        return adapter

    def _prompts(self) -> dict[str, str]:
        given = {"query": self.query_prompt, "document": self.passage_prompt}
        return {task: prompt for task, prompt in given.items() if prompt is not None}

    def _load_several(self) -> None:
        from llama_index_lora_embed.embedding.adapter_pool import AdapterPool
        from llama_index_lora_embed.models import base_model, lora_adapter

        paths = self.adapters or {}
        if self.base_model is None:
            base = lora_adapter.recorded_base(next(iter(paths.values())), cache_folder=self.cache_folder)
        else:
            base = base_model.describe_base(self.base_model, self.revision, self.cache_folder)
        self._shared = AdapterPool.of(base, **self._base_loading())
        self._known = {name: self._describe(path) for name, path in paths.items()}
        self._take_several()

    def _take_several(self) -> None:
        own, shared = self._own(), self._shared
        if own is not None:
            self._take(shared.model, own.manifest, own.fingerprint)
        else:
            prompts = {**shared.prompts, **self._prompts()}
            self._take(shared.model, None, shared.fingerprint_of(prompts, shared.max_seq_length, None))


def absolute(path: str | os.PathLike[str] | None) -> str | None:
    """A folder's absolute path, so that another working directory finds it; a Hub id as it is."""
    if path is None:
        return None
    text = os.path.expanduser(os.fspath(path))
    return os.path.abspath(text) if os.path.exists(text) else text


def checked_names(adapters: Any) -> dict[str, str]:
    """Name to absolute path.

    Raises:
        ConfigError: It is no mapping of names to paths.
    """
    if isinstance(adapters, Mapping):
        wrong = [
            f"{name!r}: {path!r}"
            for name, path in adapters.items()
            if not (isinstance(name, str) and name and isinstance(path, (str, os.PathLike)))
        ]
    else:
        wrong = [repr(adapters)]
    if wrong:
        raise ConfigError(
            f"{len(wrong)} wrong thing(s) for adapters", "names, each with a folder or Hub id", "Correct them:", wrong
        )
    return {name: str(absolute(path)) for name, path in adapters.items()}


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "none"
