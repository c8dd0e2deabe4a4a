"""The starting model: a base, or an adapter that is trained further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from llama_index_lora_embed.config import DEFAULT_BASE, FinetuneConfig
from llama_index_lora_embed.core.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.embedding import LoraEmbedding
    from llama_index_lora_embed.embedding.encode import Vectors
    from llama_index_lora_embed.models.base_model import BaseInfo
    from llama_index_lora_embed.training.objectives.frozen_passages import FrozenPassages

Loaded: TypeAlias = "tuple[SentenceTransformer, BaseInfo, dict[str, Any] | None]"
"""A model, its base, and path and fingerprint of the adapter that is continued, if any."""


@dataclass(frozen=True)
class StartingModel:
    """What training starts from, as `config.base` names it."""

    config: FinetuneConfig

    @property
    def base_model(self) -> str | None:
        """Hub id or folder of the base; None where the continued adapter names it."""
        base = self.config.base
        return None if base.continue_from is not None and base.model_id == DEFAULT_BASE else base.model_id

    def load(self) -> Loaded:
        """The model, its base, and the adapter that is continued, if any.

        Raises:
            ConfigError: The continued adapter was trained for other sides than `tune` says.
            LoraEmbedError: As `describe_base` and `load_base`, or `load_adapter`.
        """
        from llama_index_lora_embed.models.base_model import describe_base
        from llama_index_lora_embed.models.lora_adapter import load_adapter
        from llama_index_lora_embed.models.opened_adapter import open_adapter

        settings = self.config.base
        if settings.continue_from is None:
            base = describe_base(settings.model_id, settings.revision, settings.cache_folder)
            return self.load_base(base), base, None
        adapter = open_adapter(
            settings.continue_from,
            base_model=self.base_model,
            revision=settings.revision,
            cache_folder=settings.cache_folder,
        )
        tuned = adapter.tune()
        if tuned != self.config.training.tune:
            raise ConfigError(
                f"tune={self.config.training.tune!r} with continue_from={settings.continue_from!r}, which was trained "
                f"with tune={tuned!r}",
                f"tune={tuned!r}, so that base and tuned model differ on the same sides",
                "Change tune, or train a new adapter from the base.",
            )
        model, fingerprint = load_adapter(
            adapter, merge=False, pooling=settings.pooling, window=settings.window, **self._loading()
        )
        return model, adapter.base, {"path": settings.continue_from, "fingerprint": fingerprint}

    def frozen_passages(self, model: SentenceTransformer, stored: Mapping[str, Vectors]) -> FrozenPassages:
        """Stored vectors of passages, and the base's by a model that `load` has returned, whatever its adapter becomes.

        Args:
            model: As from `load`.
            stored: Vectors of an index, by text.
        """
        from llama_index_lora_embed.embedding.encode import encode
        from llama_index_lora_embed.training.objectives.frozen_passages import FrozenPassages
        from llama_index_lora_embed.training.objectives.info_nce import adapter_disabled

        def passages(texts: list[str]) -> Vectors:
            with adapter_disabled(model):
                return encode(model, texts, "document", fused=False)

        return FrozenPassages(passages, stored)

    def load_base(self, base: BaseInfo, *, quantized: bool | None = None) -> SentenceTransformer:
        """The base alone, in 4 bit or in full precision; None is what the configuration says."""
        from llama_index_lora_embed.models.base_model import load_base

        settings = self.config.base
        quantized = settings.quantized if quantized is None else quantized
        return load_base(base, pooling=settings.pooling, window=settings.window, quantized=quantized, **self._loading())

    def embedding(self) -> LoraEmbedding:
        """The same as an embedding model, for filters that embed queries before training."""
        from llama_index_lora_embed.embedding import LoraEmbedding

        settings = self.config.base
        return LoraEmbedding(
            settings.continue_from,
            base_model=self.base_model,
            revision=settings.revision,
            cache_folder=settings.cache_folder,
            pooling=settings.pooling,
            window=settings.window,
            **self._loading(),
        )

    def _loading(self) -> dict[str, Any]:
        from llama_index_lora_embed.training import distributed

        base, training = self.config.base, self.config.training
        return {
            "device": distributed.own_device(training.device),
            "trust_remote_code": training.trust_remote_code,
            "query_prompt": base.query_prompt,
            "passage_prompt": base.passage_prompt,
        }
