"""An adapter on its base: whether all of it arrived, whether it does anything, and the merge of the two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.adapter import WEIGHTS_NAME, Manifest
from llama_index_lora_embed.errors import AdapterError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

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
