"""The starting model: a base, or an adapter that is trained further."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from llama_index_lora_embed.config import DEFAULT_BASE, FinetuneConfig
from llama_index_lora_embed.core.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.embedding import LoraEmbedding
    from llama_index_lora_embed.embedding.encode import Vectors
    from llama_index_lora_embed.engines.as_installed import AsInstalled
    from llama_index_lora_embed.models.base_model import BaseInfo
    from llama_index_lora_embed.training.objectives.corpus_targets import CorpusTargets
    from llama_index_lora_embed.training.objectives.frozen_passages import FrozenPassages
    from llama_index_lora_embed.training.objectives.query_distillation import QueryTeacher

Loaded: TypeAlias = "tuple[SentenceTransformer, BaseInfo, dict[str, Any] | None, AsInstalled]"
"""A model, its base, path and fingerprint of the adapter that is continued, if any, and the model as installed."""


def as_decided(config: FinetuneConfig, model: SentenceTransformer, parent: Any = None) -> FinetuneConfig:
    """A configuration with what its loaded model decided: windows, and the training defaults that go with them.

    Checkpoints and the manifest record it. A `parent`, which is trained further, keeps its own windows.
    """
    from llama_index_lora_embed.models.windows import window_of

    window = window_of(model)
    if config.base.window == "auto":
        config = config.replace(base=config.base.replace(window=None if parent else window))
    if window is not None and config.preset == "balanced":
        config = config.replace(training=config.training.for_windows())
    return config


@dataclass(frozen=True)
class StartingModel:
    """What training starts from, as `config.base` names it."""

    config: FinetuneConfig

    @property
    def base_model(self) -> str | None:
        """Hub id or folder of the base; None where the continued adapter names it."""
        base = self.config.base
        return None if base.continue_from is not None and base.model_id == DEFAULT_BASE else base.model_id

    def load(self, passages: Collection[str] = ()) -> Loaded:
        """The model, its base, the adapter that is continued, if any, and how it is installed.

        Args:
            passages: Where `window` is "auto", their lengths decide whether the model gets windows.

        Raises:
            ConfigError: The continued adapter was trained for other sides than `tune` says.
            LoraEmbedError: As `describe_base` and `load_base`, or `load_adapter`.
        """
        from llama_index_lora_embed.engines.as_installed import AsInstalled
        from llama_index_lora_embed.models import base_model
        from llama_index_lora_embed.models.families import family_of
        from llama_index_lora_embed.models.lora_adapter import load_adapter
        from llama_index_lora_embed.models.opened_adapter import open_adapter
        from llama_index_lora_embed.models.pooling import records_pooling
        from llama_index_lora_embed.models.windows import add_windows, check_prompts
        from llama_index_lora_embed.training.lengths import choose_window

        settings, query_side = self.config.base, self.config.training.tune == "query"
        parent: dict[str, Any] | None = None
        load_anew: Callable[[], SentenceTransformer] | None = None
        if settings.continue_from is not None:
            adapter = open_adapter(
                settings.continue_from,
                base_model=self.base_model,
                revision=settings.revision,
                cache_folder=settings.cache_folder,
            )
            tuned = adapter.tune()
            if tuned != self.config.training.tune:
                raise ConfigError(
                    f"tune={self.config.training.tune!r} with continue_from={settings.continue_from!r}, which was "
                    f"trained with tune={tuned!r}",
                    f"tune={tuned!r}, so that base and tuned model differ on the same sides",
                    "Change tune, or train a new adapter from the base.",
                )
            base = adapter.base
            # an adapter of peft alone takes both for those that it was trained with
            made_with: dict[str, Any] = {"pooling": settings.pooling, "window": self._window}
            model, fingerprint = load_adapter(adapter, merge=False, **made_with, **self._loading())
            parent = {"path": settings.continue_from, "fingerprint": fingerprint}
        else:
            base = base_model.describe_base(settings.model_id, settings.revision, settings.cache_folder)
            named = records_pooling(base.path) or family_of(base.model_id) is not None
            # otherwise the given mode is all that is known, or that of the index, which stays as it is
            pooling = None if named and not query_side else settings.pooling
            load = partial(base_model.load_base, base, pooling=pooling, **self._loading())
            if self._window is None and settings.pooling == pooling:
                model = load(quantized=settings.quantized)
            else:
                model, load_anew = self.load_base(base), load
        if query_side and settings.passage_prompt is not None:  # the index has it, so that it is no change of the run
            model.prompts["document"] = settings.passage_prompt
        installed = AsInstalled(dict(model.prompts), model.max_seq_length, load_anew)
        for name, prompt in (("query", settings.query_prompt), ("document", settings.passage_prompt)):
            if prompt is not None:
                model.prompts[name] = prompt
        if parent is None and self._may_choose_window:
            window = choose_window(model, passages)
            if window is not None:
                add_windows(model, window)
                installed = replace(installed, load=load)
        check_prompts(model)
        return model, base, parent, installed

    def frozen_passages(
        self, model: SentenceTransformer, stored: Mapping[str, Vectors], teacher: QueryTeacher | None = None
    ) -> FrozenPassages:
        """Stored vectors of passages, and the base's by a model that `load` has returned, whatever its adapter becomes.

        Args:
            model: As from `load`.
            stored: Vectors of an index, by text.
            teacher: What the queries learn from instead of labels.
        """
        import torch

        from llama_index_lora_embed.embedding.encode import encode
        from llama_index_lora_embed.engines.negatives import negatives_by_linear_map
        from llama_index_lora_embed.training.objectives.frozen_passages import FrozenPassages
        from llama_index_lora_embed.training.objectives.info_nce import adapter_disabled

        def passages(texts: list[str]) -> Vectors:
            # an evaluation may ask for them under autocast, but an index holds float32
            with adapter_disabled(model), torch.autocast(model.device.type, enabled=False):
                return encode(model, texts, "document", fused=False)

        def choose_negatives(texts: list[str], vectors: torch.Tensor, targets: CorpusTargets) -> str:
            queries = torch.from_numpy(encode(model, texts, "query", fused=False)).to(vectors)
            return negatives_by_linear_map(queries, vectors, targets, self.config.training.seed)

        return FrozenPassages(passages, stored, choose_negatives, teacher)

    def load_base(self, base: BaseInfo, *, quantized: bool | None = None) -> SentenceTransformer:
        """The base alone, in 4 bit or in full precision; None is what the configuration says."""
        from llama_index_lora_embed.models.base_model import load_base

        settings = self.config.base
        quantized = settings.quantized if quantized is None else quantized
        return load_base(base, quantized=quantized, **self._options(), **self._loading())

    def embedding(self) -> LoraEmbedding:
        """The same as an embedding model, for filters that embed queries before training."""
        from llama_index_lora_embed.embedding import LoraEmbedding

        settings = self.config.base
        return LoraEmbedding(
            settings.continue_from,
            base_model=self.base_model,
            revision=settings.revision,
            cache_folder=settings.cache_folder,
            **self._options(),
            **self._loading(),
        )

    @property
    def _window(self) -> int | None:
        """The window that the configuration names; None where there is none, or the passages decide."""
        window = self.config.base.window
        return None if window == "auto" else window

    @property
    def _may_choose_window(self) -> bool:
        """Whether the passages decide: not where an index or a length is given, or where a second base is too large."""
        base, training = self.config.base, self.config.training
        fixed = training.tune == "query" or training.max_seq_length is not None or base.quantized
        return base.window == "auto" and not fixed

    def _options(self) -> dict[str, Any]:
        settings = self.config.base
        names = ("pooling", "query_prompt", "passage_prompt")
        return {"window": self._window, **{name: getattr(settings, name) for name in names}}

    def _loading(self) -> dict[str, Any]:
        from llama_index_lora_embed.training import distributed

        training = self.config.training
        return {
            "device": distributed.own_device(training.device),
            "trust_remote_code": training.trust_remote_code,
        }
