"""LoRA adapters: opening an adapter directory, loading it onto its base model, checking, scaling and merging it."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import AdapterError, BaseModelMismatchError, ConfigError, ModelNotFoundError
from llama_index_lora_embed.core.files import file_digest
from llama_index_lora_embed.models.adapter_directory import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Manifest,
    check_files,
    describe_modules,
    fingerprint,
    rename_magnitudes,
)
from llama_index_lora_embed.models.base_model import (
    BaseInfo,
    describe_base,
    load_sentence_transformer,
    locate,
    set_truncation,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_MERGE_TOLERANCE = 1e-5
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

    def tune(self) -> str:
        """Which sides it is for: "both", or "query" if passages are embedded by the base alone."""
        return "both" if self.manifest is None else self.manifest.tune

    def prompts(self) -> dict[str, str]:
        """Prompts "query" and "document" that the adapter was saved with."""
        recorded = _read_json(self.directory / "config_sentence_transformers.json").get("prompts") or {}
        return {task: recorded.get(task) or "" for task in ("query", "document")}

    def max_seq_length(self) -> int | None:
        """Tokens per text that the adapter was saved with; None if no file names them."""
        if self.manifest is not None:
            return self.manifest.max_seq_length
        for name, key in (("sentence_bert_config", "max_seq_length"), ("tokenizer_config", "model_max_length")):
            if isinstance(limit := _read_json(self.directory / f"{name}.json").get(key), int):
                return limit
        return None

    def modules(self) -> list[dict[str, Any]] | None:
        """Modules after the transformer, as by `describe_modules`; None for an adapter of peft, which names none."""
        if self.manifest is not None:
            return self.manifest.pooling
        try:
            listed = json.loads((self.directory / "modules.json").read_text(encoding="utf-8"))[1:]
        except (OSError, ValueError):
            return None
        return [
            {"type": module["type"].rpartition(".")[2], **_read_json(self.directory / module["path"] / "config.json")}
            for module in listed
        ]

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


def load_adapter(
    adapter: OpenedAdapter,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    truncate_dim: int | None = None,
    merge: bool = True,
    scale: float = 1.0,
) -> tuple[SentenceTransformer, str]:
    """Load an adapter on its base model in float32, and check that every weight arrived.

    The arguments are those of `LoraEmbedding`, and `scale` its `adapter_scale`.

    Returns:
        The model, and its `fingerprint`.

    Raises:
        AdapterError: The weights do not fit the base model, or have no effect.
        ConfigError: `truncate_dim` does not fit, or an adapter that is more than plain LoRA was to be scaled.
    """
    from llama_index_lora_embed.models.windows import check_prompts

    directory, base = adapter.directory, adapter.base
    if scale != 1 and (more := adapter.more_than_lora()):
        raise ConfigError(
            f"adapter_scale={scale!r} for an adapter with {', '.join(more)}",
            "plain LoRA, which can be scaled",
            "Leave adapter_scale=1.",
        )
    with tempfile.TemporaryDirectory() as folder:
        # sentence-transformers finds the base model by the adapter's config alone, and ignores some names of weights
        copy = Path(folder) / "adapter"
        shutil.copytree(directory, copy, copy_function=shutil.copyfile)  # writable, even if the adapter is read-only
        config = {**adapter.config, "base_model_name_or_path": str(base.path), "revision": None}
        (copy / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        rename_magnitudes(copy / WEIGHTS_NAME)
        try:
            model = load_sentence_transformer(str(copy), device, trust_remote_code)
        except Exception as error:  # wrong shapes and names raise many kinds of errors
            raise does_not_load(directory, base, error) from error
    check_keys(model, directory)
    check_effect(adapter)
    # the adapter's files contain the prompts that it was trained with
    overrides = {"query": query_prompt, "document": passage_prompt}
    model.prompts.update({name: prompt for name, prompt in overrides.items() if prompt is not None})
    check_prompts(model)
    set_truncation(model, truncate_dim)
    digest = fingerprint(model, base.weights_sha256, directory, scale=scale, tune=adapter.tune())
    scale_lora(model, scale)
    if merge:
        merge_lora(model)
    return model, digest


def does_not_load(directory: Path, base: BaseInfo, error: Exception) -> AdapterError:
    """The error for an adapter whose weights do not fit a base model."""
    return AdapterError(
        f"the adapter {str(directory)!r}, which does not load onto {base.model_id!r} ({type(error).__name__}: {error})",
        "an adapter for this base model",
        "Pass the base model that it was trained on as base_model=, or train again.",
    )


def check_keys(model: SentenceTransformer, directory: Path, adapter_name: str | None = None) -> None:
    """Check that the model has exactly the weights of the adapter's file; the loaders only log a difference.

    Raises:
        AdapterError: Weights are left over, missing or different.
    """
    import torch
    from safetensors.torch import load_file

    stored = {_name_in_model(key): tensor for key, tensor in load_file(directory / WEIGHTS_NAME).items()}
    loaded = model.get_adapter_state_dict(adapter_name)
    wrong = {
        "left over": stored.keys() - loaded.keys(),
        "missing": loaded.keys() - stored.keys(),
        "different": {
            key
            for key in stored.keys() & loaded.keys()
            if not torch.equal(stored[key].float(), loaded[key].cpu().float())
        },
    }
    parts = [f"{len(keys)} {what} (e.g. {min(keys)})" for what, keys in wrong.items() if keys]
    if parts:
        raise AdapterError(
            f"adapter weights in {str(directory)!r} that do not fit the base model: {', '.join(parts)}",
            "exactly one weight for each adapted module",
            "Check that the base model is the right one, or train again.",
        )


def _name_in_model(key: str) -> str:
    name = key.removeprefix("base_model.model.")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def check_effect(adapter: OpenedAdapter) -> None:
    """Check that an adapter changes the base model's vectors, unless its manifest says that step 0 was best.

    Raises:
        AdapterError: All of its lora_B weights are zero.
    """
    from safetensors.torch import load_file

    manifest = adapter.manifest
    ups = [tensor for key, tensor in load_file(adapter.directory / WEIGHTS_NAME).items() if "lora_B" in key]
    untrained = bool(ups) and not any(bool(tensor.any()) for tensor in ups)
    if untrained and not (manifest is not None and manifest.best_step == 0):
        raise AdapterError(
            f"an adapter in {str(adapter.directory)!r} whose lora_B weights are all zero, so that it changes nothing",
            "trained weights",
            "Train again, or use the base model alone: LoraEmbedding(base_model=...).",
        )


def check_poolable(adapter: OpenedAdapter, model: SentenceTransformer) -> None:
    """Check that an adapter can share its loaded base model with other adapters.

    Raises:
        ConfigError: The adapter is more than plain LoRA, or has other modules after the transformer than the model.
    """
    directory, alone = adapter.directory, f"Load it alone: LoraEmbedding({str(adapter.directory)!r})."
    if more := adapter.more_than_lora():
        raise ConfigError(
            f"the adapter {str(directory)!r} with {', '.join(more)}",
            "plain LoRA, the only kind that can share a forward pass",
            alone,
        )
    for path in directory.rglob("*.safetensors"):  # weights of heads that sentence-transformers may have trained
        same = adapter.base.path / path.relative_to(directory)
        if path != directory / WEIGHTS_NAME and not (same.is_file() and file_digest(same) == file_digest(path)):
            raise ConfigError(
                f"the adapter {str(directory)!r} with its own weights in {path.relative_to(directory)}",
                "an adapter whose other modules are those of the base model",
                alone,
            )
    loaded = json.loads(json.dumps(describe_modules(model)))
    trained = adapter.modules()
    if trained is not None and trained != loaded:
        raise ConfigError(
            f"the adapter {str(directory)!r}, trained with the modules {trained}",
            f"the modules of the loaded base model, {loaded}",
            f"Pass the pooling= or window= that it was trained with. {alone}",
        )


def scale_lora(model: SentenceTransformer, scale: float, adapter_name: str = "default") -> None:
    """Multiply a plain, unmerged LoRA by a factor: with 0 it has no effect, with 1 it is unchanged."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            layer.scaling[adapter_name] *= scale


def merge_lora(model: SentenceTransformer) -> None:
    """Merge the active LoRA into the base model's weights, in place, and check that the vectors stay the same.

    peft's `merge_and_unload` is a method of `PeftModel`, which models with `add_adapter`, like sentence-transformers',
    are not. DoRA, rank-stabilised scales and LoRA biases are merged too; modules that were trained whole
    (`modules_to_save`) replace those of the base model.

    Raises:
        AdapterError: Merged and unmerged vectors of a probe text differ by more than 1e-5.
    """
    import numpy as np
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    transformer = model.transformers_model
    if transformer is None or not any(isinstance(m, BaseTunerLayer) for m in transformer.modules()):
        return
    probe = ["How is an adapter merged?", "The weights of the adapter are added to those of the base model."]
    before = model.encode(probe, show_progress_bar=False, normalize_embeddings=True)
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            _add_bias(layer)
            layer.merge(safe_merge=True)
            plain = layer.get_base_layer()
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            continue
        parent_name, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent_name), child, plain)
    transformer._hf_peft_config_loaded = False
    transformer.peft_config = {}
    after = model.encode(probe, show_progress_bar=False, normalize_embeddings=True)
    difference = float(np.abs(before - after).max())
    if not difference <= _MERGE_TOLERANCE:
        raise AdapterError(
            f"merged vectors that differ from unmerged ones by {difference:.1e}",
            f"a difference of at most {_MERGE_TOLERANCE:.0e}",
            "Load the adapter with merge=False.",
        )


def _add_bias(layer: Any) -> None:
    """Add a zero bias to a base layer without one if the LoRA has a bias; peft refuses to merge otherwise."""
    import torch

    plain = layer.get_base_layer()
    if any(getattr(layer, "lora_bias", {}).values()) and getattr(plain, "bias", None) is None:
        plain.bias = torch.nn.Parameter(plain.weight.new_zeros(plain.out_features), requires_grad=False)
