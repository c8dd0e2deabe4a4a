"""`LoraEmbedding`: a base model with an adapter as a LlamaIndex embedding model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

from llama_index_lora_embed.core.errors import AdapterError, ConfigError
from llama_index_lora_embed.embedding.cache import ModelEmbeddingsCache, asking
from llama_index_lora_embed.embedding.exported import EXPORT_NAME, ExportedModel, open_export
from llama_index_lora_embed.embedding.many_adapters import ManyAdapters, absolute, checked_names
from llama_index_lora_embed.models.tokens import check_text, check_texts, count_tokens, longest_first

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.embedding.adapter_pool import Adapter
    from llama_index_lora_embed.embedding.export import Certificate
    from llama_index_lora_embed.models.adapter_directory import Manifest

_BATCH_SIZE = 256


class LoraEmbedding(ManyAdapters):
    """A LlamaIndex embedding model from an adapter directory, ours or one that sentence-transformers saved.

    Vectors are those of `SentenceTransformer(adapter_path)`: queries with its query prompt, texts with its
    document prompt, cut at the recorded `max_seq_length`. The LoRA is merged into the base in float32, so that
    inference costs what the base costs. All texts of a call are put in the order of their length and computed so many
    tokens at a time, so that little padding is computed.

    With `adapters` it holds many of them on one base in memory, which every other such object of the process shares.
    `with_adapter(name)` is one of them, as cheap as a name; `get_mixed_embeddings` embeds texts that each name
    their own.

    It is made of plain values alone: it survives `to_dict`/`from_dict`, pickling and the worker processes of an
    `IngestionPipeline`. The `fingerprint` in its dict changes whenever its vectors would, so that LlamaIndex's
    ingestion cache sees a retrained model as a new one.

    Args:
        adapter_path: Folder or Hub id of the adapter, or folder of an export; None for the untuned base.
        base_model: Folder or Hub id of the base, where it is not the place recorded in the adapter, or where
            there is no adapter.
        revision: Commit of the adapter (of `base_model`, where there is none or several) on the Hub.
        cache_folder: Of huggingface_hub.
        device: torch device; None lets sentence-transformers choose.
        query_prompt: Overrides the recorded query prompt.
        passage_prompt: Overrides the recorded passage prompt.
        pooling: Overrides the pooling of a base alone ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens" or
            "weightedmean"). An adapter's is the one that it was trained with.
        window: Has a base alone read long texts in windows of so many tokens (`windows.add_windows`). An adapter's
            are those that it was trained with.
        truncate_dim: Cuts vectors to their first so many dimensions, and scales them to length 1 again if the model
            does; for models trained with Matryoshka losses.
        merge: Merge the LoRA into the base's weights.
        trust_remote_code: Run Python code that the base brings along.
        adapters: Name to folder or Hub id, of adapters that were trained on one base; instead of `adapter_path`. They
            are not merged. Without `base_model`, the base is the one that the first of them names.
        adapter: Which of `adapters` its vectors are of; None for the base's own.
        adapter_scale: What the LoRA is multiplied by, from 0 (the base's vectors) to 1: between them lies less of what
            was learnt and less of what was forgotten. `tune_scale` finds it by validation data.
        max_adapters: How many adapters to hold in memory; the least recently used is unloaded, and loaded again when it
            is named. Of several objects that share a base the largest counts.
        embed_batch_size: Texts that LlamaIndex hands over at once, 1 to 2048; a forward pass has no more.
        tokens_per_pass: Tokens in a forward pass, padding included; None for 2,048 on a processor and 65,536 elsewhere.
            Lower it where a device's memory runs out.

    Raises:
        ConfigError: Neither adapter nor base is named; `truncate_dim` is more than the model's dimensions; or
            `pooling` is no mode; or `pooling` or `window` is not what the adapter was trained with; or `adapter` is
            none of `adapters`.
        ModelNotFoundError: Adapter or base is not there.
        AdapterError: The adapter is damaged or does not fit its base, or `fingerprint` was given (by
            `from_dict` or unpickling) and the files have changed since.
        BaseModelMismatchError: The base is another than the adapter was trained on.

    Example:
        >>> embed_model = LoraEmbedding("runs/handbook")  # doctest: +SKIP
        >>> index = VectorStoreIndex(nodes, embed_model=embed_model)  # doctest: +SKIP
    """

    adapter_path: str | None = Field(default=None, description="Folder or Hub id of the adapter.")
    device: str | None = Field(default=None, description="torch device.")
    pooling: str | None = Field(default=None, description="Overrides the pooling of a base alone.")
    window: int | None = Field(default=None, description="Windows in which a base alone reads long texts, in tokens.")
    truncate_dim: int | None = Field(default=None, description="Cuts vectors to so many dimensions.")
    merge: bool = Field(default=True, description="Merge the LoRA into the base.")
    trust_remote_code: bool = Field(default=False, description="Run the base's own code.")
    tokens_per_pass: int | None = Field(default=None, ge=1, description="Tokens in a forward pass.")

    _model: Any = PrivateAttr(default=None)
    _manifest: Any = PrivateAttr(default=None)
    _unit_length: bool = PrivateAttr(default=False)
    _lent: bool = PrivateAttr(default=False)

    def __init__(
        self,
        adapter_path: str | os.PathLike[str] | None = None,
        *,
        base_model: str | os.PathLike[str] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        embed_batch_size: int = _BATCH_SIZE,
        **kwargs: Any,
    ) -> None:
        if adapter_path is None and base_model is None and not adapters:
            raise ConfigError(
                "LoraEmbedding() without a model",
                "adapter_path, base_model or both, or adapters",
                'LoraEmbedding("runs/handbook")',
            )
        own, base = (absolute(path) for path in (adapter_path, base_model))
        named = None if adapters is None else checked_names(adapters)
        if named is None and kwargs.get("adapter") is not None:
            named = {}  # the name is unknown, which is said where the known ones are
        if own is not None and named is not None:
            raise ConfigError(
                f"adapter_path={own!r} together with adapters",
                "one adapter, or several by name",
                f"LoraEmbedding(adapters={{'a name': {own!r}, ...}})",
            )
        places = [own, (named or {}).get(kwargs.get("adapter") or ""), base, *(named or {}).values()]
        kwargs.setdefault("model_name", next((place for place in places if place), None))
        super().__init__(
            **{
                "adapter_path": own,
                "base_model": base,
                "adapters": named,
                "embed_batch_size": embed_batch_size,
                **kwargs,
            }
        )
        self.embeddings_cache = self.embeddings_cache  # as `__setattr__` has it
        self._load()

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return "LoraEmbedding"

    @property
    def manifest(self) -> Manifest | None:
        """How the adapter was made; None for a base alone and for adapters of sentence-transformers."""
        self._ready()
        manifest: Manifest | None = self._manifest
        return manifest

    @property
    def max_seq_length(self) -> int:
        """Tokens, special ones included, beyond which a text is cut."""
        model = self._ready()
        own = self._own()
        if self._shared is not None:  # the model's own changes from batch to batch
            return int(self._shared.max_seq_length if own is None else own.max_seq_length)
        return int(model.max_seq_length or 0)

    @property
    def sentence_transformer(self) -> SentenceTransformer:
        """The loaded model; with `merge=False`, sentence-transformers' own calls for adapters do something on it.

        Raises:
            ConfigError: The model is shared with others, who would get what it is told.
        """
        model = self._own_model()
        self._lent = True
        return model

    def _own_model(self) -> SentenceTransformer:
        """`sentence_transformer` for those who keep nothing of it."""
        model = self._ready()
        if isinstance(self._model, ExportedModel):
            source = f"It was made from {self._model.facts.name!r}."
            raise ConfigError("a model that was exported", "one of torch", source)
        if self._shared is not None:
            raise ConfigError(
                "the model of an embedding model with adapters, which others in the process share",
                "one of its own",
                "LoraEmbedding(path, merge=False).sentence_transformer",
            )
        return model

    def _ready(self) -> SentenceTransformer:
        """The model, loaded now if this object came out of a pickle."""
        with self._lock:
            if self._model is None:
                self._load()
            model: SentenceTransformer = self._model
            return model

    def _load(self) -> None:
        from llama_index_lora_embed.models import base_model, lora_adapter
        from llama_index_lora_embed.models.adapter_directory import fingerprint
        from llama_index_lora_embed.models.prompts import pooling_of
        from llama_index_lora_embed.models.windows import window_of

        if self.adapters is not None:
            self._load_several()
            return
        prompts: dict[str, Any] = {"query_prompt": self.query_prompt, "passage_prompt": self.passage_prompt}
        if self.adapter_path is not None and (Path(self.adapter_path) / EXPORT_NAME).exists():
            decided = ("base_model", "query_prompt", "passage_prompt", "pooling", "window", "truncate_dim")
            given = [name for name in decided if getattr(self, name) is not None]
            given += ["adapter_scale"] if self.adapter_scale != 1 else []
            given += ["merge"] if not self.merge else []
            given += ["device"] if self.device not in (None, "cpu") else []
            exported: Any = open_export(Path(self.adapter_path), given)
            self._take(exported, None, exported.facts.fingerprint)
            return
        if self.adapter_path is not None:
            loaded = lora_adapter.load_adapter(
                self.adapter_path,
                base_model=self.base_model,
                revision=self.revision,
                cache_folder=self.cache_folder,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                merge=self.merge,
                scale=self.adapter_scale,
                truncate_dim=self.truncate_dim,
                **prompts,
            )
            model, manifest, digest = loaded.model, loaded.manifest, loaded.fingerprint
            for name, trained in (("pooling", pooling_of(model)), ("window", window_of(model))):
                wanted = getattr(self, name)
                if wanted is not None and wanted != trained:
                    raise ConfigError(
                        f"{name}={wanted!r} for an adapter that was trained with {trained!r}",
                        f"the {name} that it was trained with",
                        f"Leave {name}=None, or train an adapter with the other.",
                    )
        else:
            assert self.base_model is not None
            base = base_model.describe_base(self.base_model, self.revision, self.cache_folder)
            model = base_model.load_base(base, **self._base_loading(), **prompts)
            manifest, digest = None, fingerprint(model, base.weights_sha256, None)
        self._take(model, manifest, digest)

    def export(self, path: str | os.PathLike[str], **settings: Any) -> Certificate:
        """`export.export_model`: write this model for ONNX Runtime or OpenVINO, fp32 or int8.

        Args:
            path: Folder to write; `LoraEmbedding(path)` loads it.
            **settings: texts, queries, backend, precision, min_cosine and min_agreement, as `export_model` has them.

        Returns:
            How near its vectors are to these.

        Example:
            >>> embed_model.export("runs/handbook-int8", texts=texts, precision="int8")  # doctest: +SKIP
        """
        from llama_index_lora_embed.embedding.export import export_model

        return export_model(self, path, **settings)

    def _base_loading(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "pooling": self.pooling,
            "window": self.window,
            "truncate_dim": self.truncate_dim,
        }

    def _take(self, model: SentenceTransformer, manifest: Manifest | None, digest: str) -> None:
        from llama_index_lora_embed.models.adapter_directory import normalises

        if self.fingerprint is not None and self.fingerprint != digest:
            raise AdapterError(
                f"{self.model_name!r} with the fingerprint {digest[:12]}...",
                f"{self.fingerprint[:12]}..., which was recorded when this object was saved; it was retrained since, "
                "so that its vectors no longer fit those of then",
                f"LoraEmbedding({self.model_name!r}) loads the model of now; index with it again.",
            )
        self.fingerprint = digest
        self._manifest = manifest
        # sentence-transformers cuts after the model's own normalisation
        self._unit_length = self.truncate_dim is not None and normalises(model)
        self._model = model

    def __getstate__(self) -> dict[str, Any]:
        """Plain values only: the weights are loaded again where they are needed."""
        return {"fields": {name: getattr(self, name) for name in _plain_fields(type(self))}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # not through __init__: a process that only passes the object on should not load the model
        blank = type(self).model_construct(**state["fields"])
        for slot in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"):
            object.__setattr__(self, slot, getattr(blank, slot))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> LoraEmbedding:
        """A copy that loads its own model when it is first used; locks and loaded weights are not copied."""
        copy = type(self).__new__(type(self))
        copy.__setstate__(self.__getstate__())
        return copy

    def _encode(self, texts: list[str], *, query: bool) -> list[Embedding]:
        self._ready()  # texts were checked where they came in
        return self._encode_with(texts, [self._own()] * len(texts), query=query)

    def _encode_with(self, texts: list[str], adapters: list[Adapter | None], *, query: bool) -> list[Embedding]:
        from llama_index_lora_embed.embedding.encode import encode

        task: Literal["query", "document"] = "query" if query else "document"
        if self._shared is not None:
            vectors = self._shared.encode(
                texts,
                adapters,
                task,
                most_adapters=self.max_adapters,
                base_prompts={**self._shared.prompts, **self._prompts()},
                most_tokens=self.tokens_per_pass,
                most_texts=self.embed_batch_size,
                unit_length=self._unit_length,
            )
        else:
            # fast tokenizers change truncation state while they work, so that threads must take turns
            with self._lock:
                vectors = encode(
                    self._model,
                    texts,
                    task,
                    most_tokens=self.tokens_per_pass,
                    most_texts=self.embed_batch_size,
                    unit_length=self._unit_length,
                    fused=not self._lent,  # whoever has the model may change its weights in ways that nobody sees
                )
        rows: list[Embedding] = vectors.tolist()
        return rows

    def get_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **kwargs: Any) -> list[Embedding]:
        """Vectors of passages, in their order; computed longest first.

        Raises:
            ConfigError: One is no string.
        """
        checked = check_texts(texts)
        order = longest_first(checked)
        with self._asking("document"):
            vectors = super().get_text_embedding_batch([checked[i] for i in order], show_progress, **kwargs)
        return _back(vectors, order)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """`get_text_embedding_batch`, in threads."""
        checked = check_texts(texts)
        order = longest_first(checked)
        with self._asking("document"):
            vectors = await super().aget_text_embedding_batch([checked[i] for i in order], show_progress, **kwargs)
        return _back(vectors, order)

    def get_text_embedding(self, text: str) -> Embedding:
        """The vector of a passage.

        Raises:
            ConfigError: It is no string.
        """
        with self._asking("document"):
            return super().get_text_embedding(check_text(text))

    async def aget_text_embedding(self, text: str) -> Embedding:
        """`get_text_embedding`, in a thread."""
        with self._asking("document"):
            return await super().aget_text_embedding(check_text(text))

    def get_query_embedding(self, query: str) -> Embedding:
        """The vector of a query.

        Raises:
            ConfigError: It is no string.
        """
        with self._asking("query"):
            return super().get_query_embedding(check_text(query))

    async def aget_query_embedding(self, query: str) -> Embedding:
        """`get_query_embedding`, in a thread."""
        with self._asking("query"):
            return await super().aget_query_embedding(check_text(query))

    def is_cut(self, texts: list[str]) -> list[bool]:
        """Whether passages are longer than the model reads, prompt and special tokens included.

        Raises:
            ConfigError: One is no string.
        """
        checked = check_texts(texts)
        model, own, shared = self._ready(), self._own(), self._shared
        lock: Any = self._lock
        prompts: Mapping[str, str | None] = model.prompts
        if shared is not None:
            lock = shared.lock
            prompts = {**shared.prompts, **self._prompts()} if own is None else own.prompts
        limit = self.max_seq_length
        with lock:  # tokenizers change their state while they work
            return [count > limit for count in count_tokens(model, checked, prompts.get("document") or "")]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, ModelEmbeddingsCache.of(value) if name == "embeddings_cache" else value)

    def _asking(self, task: str) -> AbstractContextManager[None]:
        if self.embeddings_cache is not None:
            self._ready()  # which the fingerprint comes from
        return asking(self.fingerprint, task)

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._encode([query], query=True)[0]

    def _get_query_embeddings(self, queries: list[str]) -> list[Embedding]:
        """Of many at once, which LlamaIndex does not ask for; its cache and callbacks are passed by."""
        return self._encode(check_texts(queries), query=True)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._encode([text], query=False)[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.to_thread(self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._encode(texts, query=False)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


def _back(vectors: list[Embedding], order: list[int]) -> list[Embedding]:
    """Vectors in the order in which the texts were given."""
    given: list[Embedding] = [[]] * len(order)
    for vector, number in zip(vectors, order, strict=True):
        given[number] = vector
    return given


def _plain_fields(cls: type[LoraEmbedding]) -> list[str]:
    return [name for name, info in cls.model_fields.items() if not info.exclude]
