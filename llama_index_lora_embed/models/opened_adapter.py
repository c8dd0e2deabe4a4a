"""Opening an adapter directory: its files are checked and its base is found, but no weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index_lora_embed.core.errors import AdapterError, BaseModelMismatchError, ConfigError, ModelNotFoundError
from llama_index_lora_embed.models.adapter_directory import CONFIG_NAME, Manifest, check_files
from llama_index_lora_embed.models.base_model import BaseInfo, describe_base, locate
from llama_index_lora_embed.models.families import family_of
from llama_index_lora_embed.models.pooling import records_pooling

# settings that make an adapter more than a low-rank product added to a weight
_MORE_THAN_LORA = (
    *("use_dora", "use_qalora", "use_bdlora", "modules_to_save", "lora_bias", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "megatron_config"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
# all other initialisations (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base model's weights when they are loaded
_INITIALISATIONS_OF_LORA = (None, True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter directory whose files have been checked; its weights are not loaded.

    `config` is adapter_config.json, `manifest` None for an adapter that sentence-transformers saved.
    """

    directory: Path
    config: dict[str, Any]
    manifest: Manifest | None
    base: BaseInfo

    @property
    def of_peft_alone(self) -> bool:
        """Whether its files hold nothing but the LoRA, so that all else is that of its base as `load_base` gives it."""
        return self.manifest is None and not records_pooling(self.directory)

    def tune(self) -> str:
        """Which sides it is for: "both", or "query" if passages are embedded by the base alone."""
        return "both" if self.manifest is None else self.manifest.tune

    def prompts(self) -> dict[str, str]:
        """Prompts "query" and "document" that the adapter was saved with; empty for an adapter of peft alone."""
        if self.of_peft_alone:
            return {}
        recorded = _read_json(self.directory / "config_sentence_transformers.json").get("prompts") or {}
        return {task: recorded.get(task) or "" for task in ("query", "document")}

    def max_seq_length(self) -> int | None:
        """Tokens per text that the adapter was saved with; None if no file names them."""
        if self.manifest is not None:
            return self.manifest.max_seq_length
        if self.of_peft_alone:
            return None
        for name, key in (("sentence_bert_config", "max_seq_length"), ("tokenizer_config", "model_max_length")):
            if isinstance(limit := _read_json(self.directory / f"{name}.json").get(key), int):
                return limit
        return None

    def modules(self) -> list[dict[str, Any]] | None:
        """Modules after the transformer, as by `describe_modules`; None for an adapter of peft alone.

        Raises:
            AdapterError: They cannot be read.
        """
        if self.manifest is not None:
            return self.manifest.pooling
        if self.of_peft_alone:
            return None
        path = self.directory / "modules.json"
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))[1:]
        except (OSError, ValueError) as error:
            raise AdapterError(f"an unreadable {path} ({error})", "the original file", "Train again.") from error
        return [
            {"type": module["type"].rpartition(".")[2], **_read_json(self.directory / module["path"] / "config.json")}
            for module in listed
        ]

    def tokenizer_folder(self) -> Path | None:
        """Where an adapter of peft alone has a tokenizer of its own; None if it takes its base's."""
        has = self.of_peft_alone and (self.directory / "tokenizer_config.json").is_file()
        return self.directory if has else None

    def more_than_lora(self) -> list[str]:
        """Settings that make the adapter more than plain LoRA; most adapters have none."""
        more = [name for name in _MORE_THAN_LORA if self.config.get(name)]
        more += ["bias"] if self.config.get("bias", "none") != "none" else []
        initialisation = self.config.get("init_lora_weights", True)
        more += [] if initialisation in _INITIALISATIONS_OF_LORA else [f"init_lora_weights={initialisation!r}"]
        kind = self.config.get("peft_type")
        return more if kind == "LORA" else [f"peft_type {kind!r}", *more]


def open_adapter(
    path: str,
    *,
    base_model: str | BaseInfo | None = None,
    revision: str | None = None,
    cache_folder: str | None = None,
) -> OpenedAdapter:
    """Find an adapter, check its files, and find the base model that it was trained on.

    Args:
        path: Folder or Hub id of the adapter.
        base_model: Folder or Hub id of the base model, if it has moved; or the base model that is loaded already, which
            must be the adapter's; None for the one that the adapter names.
        revision: Commit of the adapter on the Hub.
        cache_folder: Cache folder of huggingface_hub.

    Raises:
        ModelNotFoundError: The adapter or its base model does not exist.
        AdapterError: The adapter is damaged, or names no base model.
        BaseModelMismatchError: The base model's weights are not those that the adapter was trained on.
        UnsafeCheckpointError: The adapter or its base model is stored as a pickle.
    """
    directory, _ = locate(path, revision, cache_folder)
    manifest = check_files(directory)
    config = _read_config(directory / CONFIG_NAME)
    recorded = config.get("base_model_name_or_path")
    loaded = base_model if isinstance(base_model, BaseInfo) else None
    if loaded is not None and manifest is not None:
        base = loaded
    else:
        # an adapter of sentence-transformers records where its base model is, but not which weights it has
        place = base_model if isinstance(base_model, str) else recorded
        if not place:
            raise AdapterError(
                f"{str(directory / CONFIG_NAME)!r}, which names no base model",
                "base_model_name_or_path",
                "Pass the base model as base_model=.",
            )
        try:
            base = describe_base(place, None if isinstance(base_model, str) else config.get("revision"), cache_folder)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                f"the adapter {str(directory)!r}, whose base model {place!r} was not found",
                "the base model that it was trained on",
                f"Pass its new path as base_model=. ({error})",
            ) from error
    trained_on = base.weights_sha256 if manifest is None else manifest.base["weights_sha256"]
    base = loaded or base
    if base.weights_sha256 != trained_on:
        alone = f"Load the adapter alone: LoraEmbedding({str(directory)!r})."
        raise BaseModelMismatchError(
            f"base model {base.model_id!r} with weights {base.weights_sha256[:12]}... for {str(directory)!r}",
            f"the weights that the adapter was trained on, {trained_on[:12]}... ({recorded})",
            alone if loaded else "Pass the right base model as base_model=, or train again on this one.",
        )
    return OpenedAdapter(directory, config, manifest, base)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"an unreadable {path} ({error})", "the original file", "Train again.") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{path} without a peft_type", "the configuration of a peft adapter", "Train again.")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or contains something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def check_pooling_known(adapter: OpenedAdapter, pooling: str | None) -> None:
    """Check that the pooling an adapter was trained with can be told.

    Args:
        adapter: Of any kind.
        pooling: The caller's, which holds for an adapter of peft alone.

    Raises:
        ConfigError: Neither the adapter's nor its base's files name one, nor is the base's family known by name.
    """
    base = adapter.base
    known = not adapter.of_peft_alone or records_pooling(base.path) or family_of(base.model_id) is not None
    if pooling is None and not known:
        raise ConfigError(
            f"the adapter {str(adapter.directory)!r}, whose pooling neither its files nor those of its base "
            f"{base.model_id!r} name",
            "pooling=, the one that it was trained with",
            'Pass pooling="mean", "cls" or "lasttoken"; the code or the model card of its training says which.',
        )
