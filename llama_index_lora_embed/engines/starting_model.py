"""What training starts from: a base, or an adapter that is trained further."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding
    from llama_index_lora_embed.models.base_model import BaseInfo


@dataclass(frozen=True)
class StartingModel:
    """Where training starts.

    Attributes:
        base_model: Hub id or folder of the base; None for the one that the adapter names.
        adapter: Adapter that is trained further; None starts from the base.
        revision: Commit on the Hub, of the adapter if there is one, else of the base.
        cache_folder: Of huggingface_hub.
        device: torch device.
        trust_remote_code: Run Python code that the base brings along.
        pooling: Overrides the base's pooling.
        window: Tokens of the windows in which long texts are read; None leaves the base as it is.
        prompts: query_prompt and passage_prompt, which override the model's.
    """

    base_model: str | None
    adapter: str | None
    revision: str | None
    cache_folder: str | None
    device: str | None
    trust_remote_code: bool
    pooling: str | None
    window: int | None
    prompts: dict[str, str | None]

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint records of it; the model itself is recorded by its weights."""
        return {"pooling": self.pooling, "window": self.window, **self.prompts}

    def load(self, quantized: bool) -> tuple[SentenceTransformer, BaseInfo, dict[str, Any] | None]:
        """The model, its base, and path and fingerprint of the adapter that is continued, if any.

        Raises:
            LoraEmbedError: As `models.describe_base` and `load_base`, or `load_adapter`.
        """
        from llama_index_lora_embed.models import base_model, lora_adapter

        if self.adapter is None:
            assert self.base_model is not None
            base = base_model.describe_base(self.base_model, self.revision, self.cache_folder)
            return self.load_base(base, quantized), base, None
        loaded = lora_adapter.load_adapter(
            self.adapter,
            base_model=self.base_model,
            revision=self.revision,
            cache_folder=self.cache_folder,
            merge=False,
            **self._loading(),
        )
        return loaded.model, loaded.base, {"path": self.adapter, "fingerprint": loaded.fingerprint}

    def load_base(self, base: BaseInfo, quantized: bool) -> SentenceTransformer:
        """The base alone, in 4 bit or in full precision."""
        from llama_index_lora_embed.models import base_model

        return base_model.load_base(
            base, pooling=self.pooling, window=self.window, quantized=quantized, **self._loading()
        )

    def embedding(self) -> LoraEmbedding:
        """The same as an embedding model, for whoever has to judge texts before training."""
        from llama_index_lora_embed.embedding.lora_embedding import LoraEmbedding

        return LoraEmbedding(
            self.adapter,
            base_model=self.base_model,
            revision=self.revision,
            cache_folder=self.cache_folder,
            pooling=self.pooling,
            window=self.window,
            **self._loading(),
        )

    def _loading(self) -> dict[str, Any]:
        from llama_index_lora_embed.training import distributed

        device = distributed.own_device(self.device)
        return {"device": device, "trust_remote_code": self.trust_remote_code, **self.prompts}
