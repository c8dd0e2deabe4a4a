"""The LoRA that is trained: put on a base, in float32, everything else frozen."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llama_index_lora_embed.config import TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed.core.errors import AdapterError, NonFiniteLossError

# initialisations that leave the base's vectors as they are, and those that would change its weights
_UNCHANGED = re.compile(r"gaussian|orthogonal", re.IGNORECASE)
_SUBTRACTED = re.compile(r"pissa|pissa_niter_\d+|olora", re.IGNORECASE)
# what cannot be added to the base's weights, needs another forward pass, or was not compared by number here
_REFUSED = {
    "layer_replication": "it builds another base than the one that the adapter is loaded on",
    "megatron_config": "Megatron's layers are not loaded here",
    "target_parameters": "what it adapts cannot be merged module by module; name modules in target_modules",
    "alora_invocation_tokens": "it acts on some tokens only, so that it cannot be merged",
    "arrow_config": "it routes between several adapters",
    "use_bdlora": "it is for tensor-parallel serving",
    "use_qalora": "it is for GPTQ bases",
    "velora_config": "it was not compared by number here",
    "monteclora_config": "it samples while it embeds",
    "kasa_config": "it changes the base's weights",
    "trainable_token_indices": "it was not compared by number here; modules_to_save trains whole modules",
}


def lora_problems(lora_config: LoraConfig) -> list[str]:
    """One line for each thing in a lora_config that cannot be trained here: what was got, and what to do instead."""
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
    elif init is not True and not _UNCHANGED.fullmatch(str(init)) and not _SUBTRACTED.fullmatch(str(init)):
        found.append(
            f"init_lora_weights={init!r}: expected True, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N' or "
            "'olora'; others need data, gradients or a quantised base beforehand"
        )
    known = {field.name for field in fields(lora_config)}
    found += [
        f"{name}={getattr(lora_config, name)!r}: expected none, because {why}"
        for name, why in _REFUSED.items()
        if name in known and getattr(lora_config, name)
    ]
    return found


def add_lora(model: SentenceTransformer, lora_config: LoraConfig | None, settings: TrainingSettings) -> None:
    """Add a trainable LoRA named "default" to a model, in place, and freeze everything else.

    Its untrained vectors are the base's, and the base's weights stay as they are, whatever the initialisation.
    PiSSA and OLoRA take B₀A₀ out of the base's weight W and train BA in (W − B₀A₀) + BA. The same function of the
    same A and B is W + [B, −B₀][A; A₀]: a plain LoRA of twice the rank, one half of which is held fast, and which can
    be switched off, resumed and loaded onto the base like any other. (peft's `subtract_mutated_init` arrives at the
    same after training.)

    Args:
        model: Loaded base.
        lora_config: peft's own; None adapts all linear layers at the settings' rank. It is not changed.
        settings: Rank and alpha of the default LoRA.

    Raises:
        ConfigError: The configuration does not fit the base, or cannot be trained here.
    """
    if lora_config is None:
        lora_config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=0.0,
            target_modules=upper_modules(model, settings.lora_layers),
        )
    else:
        if problems := lora_problems(lora_config):
            raise ConfigError(
                f"a lora_config with {len(problems)} thing(s) that cannot be trained here",
                "one whose adapter starts as the base and can be merged into it",
                "Change:",
                problems,
            )
        lora_config = copy.deepcopy(lora_config)  # add_adapter writes the base's place into it
        lora_config.inference_mode = False  # set in a config that was read from an adapter's folder
        if lora_config.target_modules is None:
            lora_config.target_modules = lora_target_modules(model)
    init = lora_config.init_lora_weights
    subtracted = _SUBTRACTED.fullmatch(str(init)) is not None
    if subtracted:
        _double_rank(lora_config)
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
    _check_saved_modules(model, lora_config)
    if subtracted:
        for name, layer in model.transformers_model.named_modules():  # type: ignore[union-attr]
            if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
                _start_from_subtracted(name, layer, str(init).lower())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _check_saved_modules(model: SentenceTransformer, lora_config: LoraConfig) -> None:
    """Refuse names in `modules_to_save` that the base does not have; peft passes over them.

    Raises:
        ConfigError: There are some.
    """
    wrapped = [
        name
        for name, module in model.transformers_model.named_modules()  # type: ignore[union-attr]
        if isinstance(module, ModulesToSaveWrapper)
    ]
    missing = [wanted for wanted in lora_config.modules_to_save or [] if not any(n.endswith(wanted) for n in wrapped)]
    if missing:
        raise ConfigError(
            f"modules_to_save with {', '.join(repr(name) for name in missing)}",
            "modules of the base's transformer",
            "Correct the names; list(model.transformers_model.named_modules()) has them all.",
        )


def _double_rank(lora_config: LoraConfig) -> None:
    """Room for the fixed half, at the same scale: alpha / r, or alpha / sqrt(r) where it is rank-stabilised."""
    factor: Any = math.sqrt(2) if lora_config.use_rslora else 2
    lora_config.init_lora_weights = True
    lora_config.r *= 2
    lora_config.lora_alpha *= factor
    lora_config.rank_pattern = {name: 2 * rank for name, rank in (lora_config.rank_pattern or {}).items()}
    lora_config.alpha_pattern = {name: factor * alpha for name, alpha in (lora_config.alpha_pattern or {}).items()}


def _start_from_subtracted(name: str, layer: Any, init: str) -> None:
    """Put peft's PiSSA or OLoRA start into one half of a layer's LoRA, and its opposite, held fast, into the other.

    Raises:
        ConfigError: The layer's weight is quantised, or has fewer rows or columns than the rank.
    """
    base = layer.get_base_layer()
    rank = layer.r["default"] // 2
    if not base.weight.is_floating_point() or rank > min(base.weight.shape):
        kind = "quantised" if not base.weight.is_floating_point() else f"{tuple(base.weight.shape)}"
        raise ConfigError(
            f"init_lora_weights={init!r} of rank {rank} for the {kind} weight of {name}",
            "weights in floating point, with at least as many rows and columns as the rank",
            "Lower r, or set init_lora_weights=True.",
        )
    original = base.weight.data.clone()
    layer.r["default"] = rank
    if init == "olora":
        layer.olora_init("default")
    else:
        layer.pissa_init("default", init)
    layer.r["default"] = 2 * rank
    base.weight.data = original
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    down.data = torch.cat([down.data, down.data])
    up.data = torch.cat([up.data, -up.data], dim=1)

    def first_rows(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])])

    def first_columns(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:, :rank], torch.zeros_like(gradient[:, rank:])], dim=1)

    down.register_hook(first_rows)
    up.register_hook(first_columns)


def train_further(model: SentenceTransformer) -> None:
    """Make the adapter "default" that a model already has trainable, in place, and nothing else.

    A loaded adapter is frozen and marked for inference; sentence-transformers leaves it so (its issue 3434).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    transformer: Any = model.transformers_model
    transformer.peft_config["default"].inference_mode = False
    for module in transformer.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.set_adapter("default")
    # biases of the base that this adapter brings along, which no layer of peft's knows to be its own
    biases = {"all": ".bias", "lora_only": ".base_layer.bias"}.get(transformer.peft_config["default"].bias)
    for name, parameter in transformer.named_parameters():
        if biases is not None and name.endswith(biases):
            parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_target_modules(model: SentenceTransformer) -> list[str]:
    """Names of the linear layers that the default LoRA adapts: all those inside the transformer's layers.

    Looked up in the model instead of assumed, so that fused projections are found. What stands outside the layers
    (BERT's unused pooler, an output head) is left alone, and so are the routers of a mixture of experts, whose
    choice of experts is not what retrieval has to learn.

    Returns:
        Module suffixes as peft's `target_modules` takes them, e.g. "attention.self.query"; whole names where a
        suffix would also mean a module outside the layers.

    Raises:
        ConfigError: The model has no transformer layers with linear modules.
    """
    import torch

    transformer = model.transformers_model
    linear: dict[str, Any] = {}
    if transformer is not None:
        linear = {name: m for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    routers = _router_widths(transformer)
    targets: dict[str, list[str]] = {}
    outside: list[str] = []
    for name, module in linear.items():
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
    """Names of the linear layers that the default LoRA adapts, in the upper layers only.

    Args:
        model: Loaded base.
        share: Of the layers, from the last one down; 1 gives `lora_target_modules`.

    Raises:
        ConfigError: The model has no transformer layers with linear modules.
    """
    import torch

    targets = lora_target_modules(model)
    if share >= 1:
        return targets
    found: list[tuple[int, str]] = []
    for name, module in model.transformers_model.named_modules():  # type: ignore[union-attr]
        match = re.match(r"^(?:.*?\.)?(\d+)\.(.+)$", name)
        if match and isinstance(module, torch.nn.Linear) and (match[2] in targets or name in targets):
            found.append((int(match[1]), name))
    layers = 1 + max(number for number, _ in found)
    first = layers - max(1, math.ceil(share * layers))
    return [name for number, name in found if number >= first]


def _router_widths(transformer: Any) -> set[int]:
    """Output sizes that only routers have: one score for each expert, or a single gate."""
    config = getattr(transformer, "config", None)
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts = {count for count in counts if isinstance(count, int) and count > 0}
    return experts | {1} if experts else set()


def adapter_weights(model: SentenceTransformer) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU, by peft's names."""
    state = get_peft_model_state_dict(model.transformers_model, adapter_name="default")
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def restore_weights(model: SentenceTransformer, weights: dict[str, Tensor]) -> None:
    """Put adapter weights into the model.

    Raises:
        AdapterError: Names do not fit one to one.
    """
    shapes, stored = ({name: w.shape for name, w in of.items()} for of in (adapter_weights(model), weights))
    if odd := sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name)):
        raise AdapterError(
            f"adapter weights with {len(odd)} name(s) that do not fit (e.g. {odd[0]}: "
            f"{stored.get(odd[0], 'none')} stored, {shapes.get(odd[0], 'none')} in the model)",
            "the weights of the same LoRA on the same base",
            "Start without resume_from_checkpoint, or restore lora_config.",
        )
    set_peft_model_state_dict(model.transformers_model, dict(weights), adapter_name="default")


def check_finite(model: SentenceTransformer, where: str) -> None:
    """Refuse weights that are NaN or infinite, before anything is overwritten with them.

    Raises:
        NonFiniteLossError: There are some.
    """
    bad = [name for name, tensor in adapter_weights(model).items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise NonFiniteLossError(
            f"{len(bad)} adapter weight(s) with NaN or infinity {where} (e.g. {bad[0]})",
            "numbers",
            "Lower learning_rate or set precision='fp32'; nothing was written, and earlier checkpoints are intact.",
        )
