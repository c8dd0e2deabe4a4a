"""The LoRA that is trained: added to a base in float32, with every other weight frozen."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.core.errors import AdapterError, ConfigError, NonFiniteLossError

_MAX_MERGED_BYTES = 1 << 29
_INITIALISATIONS = re.compile(r"gaussian|orthogonal", re.IGNORECASE)  # besides True; they leave step 0 at the base
# options that cannot be merged into the base, need another forward pass, or were not compared numerically here
_UNSUPPORTED = {
    "layer_replication": "it builds another base than the one that the adapter is loaded on",
    "megatron_config": "Megatron layers are not supported",
    "target_parameters": "what it adapts cannot be merged module by module; name modules in target_modules",
    "alora_invocation_tokens": "it acts on some tokens only, so it cannot be merged",
    "arrow_config": "it routes between several adapters",
    "use_bdlora": "it is for tensor-parallel serving",
    "use_qalora": "it is for GPTQ bases",
    "velora_config": "its results were not compared numerically",
    "monteclora_config": "it samples while it embeds",
    "kasa_config": "it changes the base's weights",
    "trainable_token_indices": "its results were not compared numerically; modules_to_save trains whole modules",
}


def lora_problems(lora_config: LoraConfig) -> list[str]:
    """One line for each setting of a `lora_config` that cannot be trained here, with what to use instead."""
    found: list[str] = []
    if type(lora_config) is not LoraConfig:
        found.append(
            f"lora_config of type {type(lora_config).__name__}: expected peft.LoraConfig itself; AdaLoRA and other "
            "methods change ranks or weights while they train"
        )
    init = lora_config.init_lora_weights
    if init is False:
        found.append(
            "init_lora_weights=False: expected True, because the untrained adapter would not give the base's "
            "vectors, which are step 0 of every comparison"
        )
    elif init is not True and not _INITIALISATIONS.fullmatch(str(init)):
        found.append(
            f"init_lora_weights={init!r}: expected True, 'gaussian' or 'orthogonal', because other initialisations "
            "(PiSSA, OLoRA, EVA, CorDA, LoftQ, ...) change the base's weights or need data beforehand; use True, with "
            "use_rslora=True or use_dora=True for another LoRA than the default"
        )
    known = {field.name for field in fields(lora_config)}
    found += [
        f"{name}={getattr(lora_config, name)!r}: expected none, because {reason}"
        for name, reason in _UNSUPPORTED.items()
        if name in known and getattr(lora_config, name)
    ]
    return found


def add_lora(model: SentenceTransformer, lora_config: LoraConfig | None, settings: TrainingSettings) -> None:
    """Add a trainable LoRA named "default" to a model, in place, and freeze every other weight.

    The untrained adapter leaves the base's vectors as they are. `lora_config` must have no `lora_problems`, and is not
    changed; None takes rank, alpha and layers of the settings.

    Raises:
        ConfigError: The configuration does not fit the base.
    """
    if lora_config is None:
        lora_config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=0.0,
            target_modules=upper_modules(model, settings.lora_layers),
        )
    else:
        lora_config = copy.deepcopy(lora_config)  # add_adapter writes the base's path into it
        lora_config.inference_mode = False  # True in a configuration that was read from an adapter directory
        if lora_config.target_modules is None:
            lora_config.target_modules = lora_target_modules(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # peft freezes the transformer only; a Dense head is not in the adapter
    try:
        model.add_adapter(lora_config)
    except ValueError as error:
        raise ConfigError(
            f"a lora_config that does not fit the base ({error})",
            "target_modules that exist in it",
            f"This base has: {', '.join(lora_target_modules(model))}.",
        ) from error
    modules = model.transformers_model.named_modules()  # type: ignore[union-attr]
    wrapped = [name for name, module in modules if isinstance(module, ModulesToSaveWrapper)]
    # peft ignores names that do not exist
    missing = [wanted for wanted in lora_config.modules_to_save or [] if not any(n.endswith(wanted) for n in wrapped)]
    if missing:
        raise ConfigError(
            f"modules_to_save with {', '.join(repr(name) for name in missing)}",
            "modules of the base's transformer",
            "Correct the names; model.transformers_model.named_modules() lists them.",
        )
    _to_float32(model)


def _to_float32(model: SentenceTransformer) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train_further(model: SentenceTransformer) -> None:
    """Make the loaded adapter "default" of a model trainable, in place, and freeze every other weight.

    A loaded adapter is frozen and marked for inference, and sentence-transformers leaves it so (its issue 3434).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    transformer: Any = model.transformers_model
    transformer.peft_config["default"].inference_mode = False
    for module in transformer.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.set_adapter("default")
    # biases of the base that belong to the adapter, which no peft layer lists as its own
    biases = {"all": ".bias", "lora_only": ".base_layer.bias"}.get(transformer.peft_config["default"].bias)
    for name, parameter in transformer.named_parameters():
        if biases is not None and name.endswith(biases):
            parameter.requires_grad_(True)
    _to_float32(model)


def lora_target_modules(model: SentenceTransformer) -> list[str]:
    """Names of all linear modules inside the transformer's layers.

    They are looked up in the model, so that fused projections are found. Modules outside the layers (BERT's unused
    pooler, an output head) and the routers of a mixture of experts are left out. The names are suffixes as peft's
    `target_modules` takes them, e.g. "attention.self.query"; whole names where a suffix would also mean a module
    outside the layers.

    Raises:
        ConfigError: The model has no transformer layers with linear modules.
    """
    transformer = model.transformers_model
    routers = _router_widths(transformer)
    targets: dict[str, list[str]] = {}
    outside: list[str] = []
    for name, module in [] if transformer is None else transformer.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        match = re.match(r"^.*?\.?\d+\.(.+)$", name)  # the part after the layer's number
        if match and module.out_features not in routers:
            targets.setdefault(match[1], []).append(name)
        else:
            outside.append(name)
    if not targets:
        raise ConfigError(
            f"a model of type {type(transformer).__name__} without linear modules in numbered layers",
            "a transformer encoder or decoder",
            "Name the modules yourself: lora_config=peft.LoraConfig(target_modules=[...]).",
        )
    names: list[str] = []
    for suffix, whole in targets.items():
        ambiguous = any(name == suffix or name.endswith(f".{suffix}") for name in outside)
        names += whole if ambiguous else [suffix]
    return sorted(names)


def upper_modules(model: SentenceTransformer, share: float) -> list[str]:
    """Names of the linear modules in a share of the layers, from the last one down; 1 gives `lora_target_modules`."""
    targets = lora_target_modules(model)
    if share >= 1:
        return targets
    found: list[tuple[int, str]] = []
    for name, module in model.transformers_model.named_modules():  # type: ignore[union-attr]
        match = re.match(r"^(?:.*?\.)?(\d+)\.(.+)$", name)
        if match and isinstance(module, torch.nn.Linear) and (match[2] in targets or name in targets):
            found.append((int(match[1]), name))
    layers = 1 + max((number for number, _ in found), default=0)  # none have numbers where a model shares its layers
    first = layers - max(1, math.ceil(share * layers))
    if first == 0:
        return targets
    return [name for number, name in found if number >= first]


def _router_widths(transformer: Any) -> set[int]:
    """Output sizes that only routers have: one score per expert, or a single gate."""
    config = getattr(transformer, "config", None)
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts = {count for count in counts if isinstance(count, int) and count > 0}
    return experts | {1} if experts else set()


def adapter_weights(model: SentenceTransformer) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU, by peft's names."""
    state = get_peft_model_state_dict(model.transformers_model, adapter_name="default")
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def restore_weights(model: SentenceTransformer, weights: dict[str, Tensor]) -> None:
    """Load adapter weights into the model.

    Raises:
        AdapterError: Names or shapes differ from the model's.
    """
    shapes, stored = ({name: w.shape for name, w in of.items()} for of in (adapter_weights(model), weights))
    if odd := sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name)):
        raise AdapterError(
            f"adapter weights of which {len(odd)} do not fit (e.g. {odd[0]}: {stored.get(odd[0], 'none')} stored, "
            f"{shapes.get(odd[0], 'none')} in the model)",
            "the weights of the same LoRA on the same base",
            "Start without resume_from_checkpoint, or restore lora_config.",
        )
    set_peft_model_state_dict(model.transformers_model, dict(weights), adapter_name="default")


@contextmanager
def scaled_adapter(model: SentenceTransformer, scale: float) -> Iterator[None]:
    """Within it, the adapter's change of each weight is multiplied by `scale`; afterwards the weights are as before."""
    if scale == 1:
        yield
        return
    parameters = [p for name, p in model.transformers_model.named_parameters() if "lora_B" in name]  # type: ignore[union-attr]
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weights in zip(parameters, before, strict=True):
                parameter.copy_(weights)


@contextmanager
def merged_adapter(model: SentenceTransformer) -> Iterator[None]:
    """Within it, plain LoRA layers are merged into the base's weights, which afterwards are as before, bit for bit.

    A forward pass takes an eighth less time then (benchmarks/README.md, "Evaluations in training"). The
    base's weights are copied meanwhile. Layers that are not merged by one addition (DoRA, quantised ones), and those of
    models with more than half a gigabyte of such weights, stay as they are.
    """
    layers = [module for module in model.modules() if type(module) is LoraLinear and _is_mergeable(module)]
    weights: list[Any] = [layer.get_base_layer().weight for layer in layers]
    shared = len(set(map(id, weights))) < len(weights)
    if shared or sum(weight.nbytes for weight in weights) > _MAX_MERGED_BYTES:
        layers, weights = [], []
    before: list[Tensor] = []
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                delta = layer.get_delta_weight("default")
                before.append(weight.detach().clone())
                layer.merged_adapters.append("default")
                weight.copy_(weight + delta)  # in place, so that copies of it are known to be outdated
        yield
    finally:
        with torch.no_grad():
            for layer, weight, unmerged in zip(layers, weights, before, strict=False):
                weight.copy_(unmerged)
                layer.merged_adapters.clear()


def _is_mergeable(layer: LoraLinear) -> bool:
    base = layer.get_base_layer()
    return (
        type(base) is torch.nn.Linear
        # bfloat16 where `fused_lora` holds the base's weights in it
        and base.weight.dtype in (torch.float32, torch.bfloat16)
        and list(layer.active_adapters) == ["default"]
        and not (layer.lora_variant or layer.merged_adapters or layer.disable_adapters)
        and not any(layer.lora_bias.values())
    )


def check_scalable(weights: dict[str, Tensor], scale: float) -> None:
    """Refuse to scale an adapter whose change is not the product of two matrices alone.

    Args:
        weights: `adapter_weights` before training.
        scale: `TrainingSettings.adapter_scale`.

    Raises:
        ConfigError: It trains more than LoRA's matrices (biases, whole modules, DoRA's magnitudes), or it is trained
            further, so that the product would also scale what was learnt before.
    """
    other = sorted(name for name in weights if "lora_A" not in name and "lora_B" not in name)
    further = any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    if scale != 1 and (other or further):
        raise ConfigError(
            f"adapter_scale={scale} with " + (f"{other[0]} trained, too" if other else "an adapter to train further"),
            "a new LoRA without biases, DoRA and modules_to_save",
            "Set adapter_scale=1.0, and use LoraEmbedding(path, adapter_scale=...) or merge_adapters afterwards.",
        )


def check_finite(model: SentenceTransformer, when: str) -> None:
    """Refuse adapter weights that are NaN or infinite, before anything is overwritten with them.

    Raises:
        NonFiniteLossError: Some weights are not finite.
    """
    bad = [name for name, tensor in adapter_weights(model).items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise NonFiniteLossError(
            f"{len(bad)} adapter weight(s) with NaN or infinity {when} (e.g. {bad[0]})",
            "finite numbers",
            "Lower learning_rate or set precision='fp32'; nothing was written, and earlier checkpoints are intact.",
        )
