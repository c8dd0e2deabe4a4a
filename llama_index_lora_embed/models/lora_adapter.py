"""An adapter on its base: whether all of it arrived, whether it does anything, and the merge of the two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import AdapterError
from llama_index_lora_embed.models.adapter_directory import WEIGHTS_NAME, Manifest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
import json
import shutil
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_index_lora_embed.core.errors import (
    BaseModelMismatchError,
    ConfigError,
    ModelNotFoundError,
)
from llama_index_lora_embed.models.adapter_directory import CONFIG_NAME, check_files, fingerprint, rename_magnitudes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
from llama_index_lora_embed.models.base_model import (
    BaseInfo,
    _sentence_transformer,
    describe_base,
    locate,
    set_truncation,
)

_MERGE_TOLERANCE = 1e-5
# what is more than a low-rank product added to a weight
_MORE_THAN_LORA = (
    *("use_dora", "use_qalora", "use_bdlora", "modules_to_save", "lora_bias", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "megatron_config"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
# other ways to begin (PiSSA, OLoRA, CorDA, LoftQ, ...) take something out of the base's weights when they are loaded
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal")


def beyond_lora(config: dict[str, Any]) -> list[str]:
    """What of an adapter's configuration makes it more than plain LoRA; nothing for most.

    Args:
        config: `adapter_config.json`.
    """
    more = [name for name in _MORE_THAN_LORA if config.get(name)]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    begun = config.get("init_lora_weights", True)
    more += [] if begun in _BEGINNINGS else [f"init_lora_weights={begun!r}"]
    return more if config.get("peft_type") == "LORA" else [f"peft_type {config.get('peft_type')!r}", *more]


def scale_lora(model: SentenceTransformer, scale: float, adapter_name: str = "default") -> None:
    """Multiply a plain LoRA, which must not be merged, by a number: 0 gives the base's vectors, 1 changes nothing.

    Args:
        model: Has the adapter.
        scale: From 0 to 1.
        adapter_name: peft's name for it.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            layer.scaling[adapter_name] *= scale


def merge_lora(model: SentenceTransformer) -> None:
    """Add the active LoRA to the base's weights, in place and in float32, and check that nothing else changed.

    peft's `merge_and_unload` belongs to `PeftModel` and is missing from models that got their adapter through
    `add_adapter`, as sentence-transformers does it. DoRA, rank-stabilised scales and LoRA biases are added too;
    modules that were trained whole (`modules_to_save`) take the place of the base's.

    Args:
        model: Its transformer is changed in place and holds no adapter afterwards.

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
            _give_bias(layer)
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
            f"at most {_MERGE_TOLERANCE:.0e}",
            "Load it with merge=False.",
        )


def _give_bias(layer: Any) -> None:
    """A zero bias for a base layer without one, if the LoRA has a bias to add to it; peft would refuse to merge."""
    import torch

    plain = layer.get_base_layer()
    if any(getattr(layer, "lora_bias", {}).values()) and getattr(plain, "bias", None) is None:
        plain.bias = torch.nn.Parameter(plain.weight.new_zeros(plain.out_features), requires_grad=False)


def check_keys(model: SentenceTransformer, directory: Path, adapter_name: str | None = None) -> None:
    """Every weight of the file is in the model, and the model lacks none; the loaders only log it.

    Args:
        model: Has the adapter.
        directory: The adapter's.
        adapter_name: peft's name for it; None for the active one.

    Raises:
        AdapterError: Weights are left over, missing, or not the file's.
    """
    import torch
    from safetensors.torch import load_file

    stored = {_name_in_model(key): tensor for key, tensor in load_file(directory / WEIGHTS_NAME).items()}
    loaded = model.get_adapter_state_dict(adapter_name)
    left_over, missing = sorted(stored.keys() - loaded.keys()), sorted(loaded.keys() - stored.keys())
    changed = sorted(
        key for key in stored.keys() & loaded.keys() if not torch.equal(stored[key].float(), loaded[key].cpu().float())
    )
    if left_over or missing or changed:
        parts = [
            f"{len(keys)} {what} (e.g. {keys[0]})"
            for what, keys in (("left over", left_over), ("missing", missing), ("not taken over", changed))
            if keys
        ]
        raise AdapterError(
            f"adapter weights in {str(directory)!r} that do not fit the base: {', '.join(parts)}",
            "exactly one weight for each adapted module",
            "Check that the base is the right one, or train again.",
        )


def _name_in_model(key: str) -> str:
    name = key.removeprefix("base_model.model.")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def check_effect(directory: Path, manifest: Manifest | None) -> None:
    """An adapter whose lora_B are all zero gives exactly the base's vectors; only step 0 may do so.

    Raises:
        AdapterError: It does, and its manifest does not say that step 0 was best.
    """
    from safetensors.torch import load_file

    ups = [tensor for key, tensor in load_file(directory / WEIGHTS_NAME).items() if "lora_B" in key]
    untrained = bool(ups) and not any(bool(tensor.any()) for tensor in ups)
    if untrained and not (manifest is not None and manifest.best_step == 0):
        raise AdapterError(
            f"an adapter in {str(directory)!r} whose lora_B weights are all zero, so that it changes nothing",
            "trained weights",
            "Train again; use LoraEmbedding(base_model=...) if the base is what you want.",
        )


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its base.

    Attributes:
        model: Ready to encode; merged or not.
        base: Which base it stands on.
        fingerprint: See `adapter.fingerprint`.
        manifest: None for an adapter that sentence-transformers saved.
    """

    model: SentenceTransformer
    base: BaseInfo
    fingerprint: str
    manifest: Manifest | None


def load_adapter(
    adapter_path: str,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    cache_folder: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    truncate_dim: int | None = None,
    merge: bool = True,
    scale: float = 1.0,
) -> LoadedAdapter:
    """Load an adapter directory of ours or of sentence-transformers, checking all that can be checked.

    Args:
        adapter_path: Folder or Hub id of the adapter.
        base_model: Where the base is now, if it moved.
        revision: Commit of the adapter on the Hub.
        cache_folder: Of huggingface_hub.
        device: torch device.
        trust_remote_code: Run Python code that the base brings along.
        query_prompt: Overrides the recorded query prompt.
        passage_prompt: Overrides the recorded passage prompt.
        truncate_dim: Cuts vectors to so many dimensions.
        merge: Add the LoRA to the base's weights (float32), so that inference costs what the base costs.
        scale: Multiply the LoRA by so much, from 0 to 1.

    Raises:
        ModelNotFoundError: The adapter or its base is not there.
        AdapterError: The adapter is damaged, or its weights do not fit the base key by key.
        ConfigError: `truncate_dim` does not fit, or the adapter is more than a LoRA and cannot be scaled.
        BaseModelMismatchError: The base's weights are others than those trained on.
        UnsafeCheckpointError: Adapter or base is stored as a pickle.
    """
    from llama_index_lora_embed.models.windows import check_prompts

    directory, _ = locate(adapter_path, revision, cache_folder)
    manifest = check_files(directory)
    config = read_config(directory / CONFIG_NAME)
    if scale != 1 and (more := beyond_lora(config)):
        raise ConfigError(
            f"adapter_scale={scale!r} for an adapter with {', '.join(more)}",
            "plain LoRA, which can be scaled as a whole",
            "Leave the scale at 1.",
        )
    base = find_base(base_model, config, manifest, cache_folder, directory)
    with tempfile.TemporaryDirectory() as copy:
        # sentence-transformers reads the base's place from the adapter's config alone, and passes over some names
        staged = Path(copy) / "adapter"
        shutil.copytree(directory, staged)
        (staged / CONFIG_NAME).write_text(
            json.dumps({**config, "base_model_name_or_path": str(base.path), "revision": None}),
            encoding="utf-8",
        )
        rename_magnitudes(staged / WEIGHTS_NAME)
        try:
            model = _sentence_transformer(str(staged), device, trust_remote_code)
        except Exception as error:  # shapes and names that do not fit surface as many kinds of error
            raise AdapterError(
                f"the adapter {str(directory)!r}, which does not load onto {base.model_id!r} "
                f"({type(error).__name__}: {error})",
                "an adapter for this base model",
                "Pass the base that it was trained on as base_model=, or train again.",
            ) from error
    check_keys(model, directory)
    check_effect(directory, manifest)
    # the adapter's own config holds the prompts it was trained with; presets would guess again
    overrides = {"query": query_prompt, "document": passage_prompt}
    model.prompts.update({name: prompt for name, prompt in overrides.items() if prompt is not None})
    check_prompts(model)
    set_truncation(model, truncate_dim)
    digest = fingerprint(model, base.weights_sha256, directory, scale=scale)
    scale_lora(model, scale)
    if merge:
        merge_lora(model)
    return LoadedAdapter(model, base, digest, manifest)


def read_config(path: Path) -> dict[str, Any]:
    """An adapter's `adapter_config.json`.

    Raises:
        AdapterError: It is unreadable, or no adapter's.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"an unreadable {path} ({error})", "the file as it was written", "Train again.") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{path} without a peft_type", "the configuration of a peft adapter", "Train again.")
    return config


def recorded_base(adapter_path: str, *, cache_folder: str | None = None) -> BaseInfo:
    """The base that an adapter names, at the revision that it was trained on.

    Raises:
        ModelNotFoundError: The adapter is not there.
        AdapterError: It is none, or names no base.
    """
    directory, _ = locate(adapter_path, None, cache_folder)
    manifest = check_files(directory)
    return find_base(None, read_config(directory / CONFIG_NAME), manifest, cache_folder, directory)


def find_base(
    base_model: str | None,
    config: dict[str, Any],
    manifest: Manifest | None,
    cache_folder: str | None,
    directory: Path,
) -> BaseInfo:
    """The base that an adapter was trained on.

    Args:
        base_model: Where it is now; None for the place that the adapter recorded.
        config: `read_config`'s.
        manifest: The adapter's.
        cache_folder: Of huggingface_hub.
        directory: The adapter's, for messages.

    Raises:
        AdapterError: No base is named.
        ModelNotFoundError: It is not there.
        BaseModelMismatchError: Its weights are others than those trained on.
    """
    recorded = config.get("base_model_name_or_path")
    place = base_model or recorded
    if not place:
        raise AdapterError(
            f"{str(directory / CONFIG_NAME)!r}, which names no base model",
            "base_model_name_or_path",
            "Pass the base as base_model=.",
        )
    try:
        base = describe_base(place, None if base_model else config.get("revision"), cache_folder)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the adapter {str(directory)!r}, whose base model {place!r} was not found",
            "the base that it was trained on",
            f"Pass its new place as base_model=. ({error})",
        ) from error
    trained_on = manifest.base["weights_sha256"] if manifest is not None else base.weights_sha256
    if base.weights_sha256 != trained_on:
        raise BaseModelMismatchError(
            f"base model {base.model_id!r} with weights {base.weights_sha256[:12]}...",
            f"those that the adapter was trained on, {trained_on[:12]}... ({recorded})",
            "Pass the right base as base_model=, or train again on this one.",
        )
    return base
