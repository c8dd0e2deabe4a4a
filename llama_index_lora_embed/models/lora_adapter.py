"""LoRA adapters: loading one onto its base model, checking, scaling and merging it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import AdapterError, ConfigError
from llama_index_lora_embed.core.files import file_digest
from llama_index_lora_embed.models.adapter_directory import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    describe_modules,
    fingerprint,
    rename_magnitudes,
    tokenizer_digest,
)
from llama_index_lora_embed.models.base_model import (
    BaseInfo,
    load_base,
    load_sentence_transformer,
    set_truncation,
)
from llama_index_lora_embed.models.opened_adapter import OpenedAdapter, check_pooling_known
from llama_index_lora_embed.models.pooling import load_tokenizer, pooling_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_MERGE_TOLERANCE = 1e-5


def load_adapter(
    adapter: OpenedAdapter,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    pooling: str | None = None,
    window: int | None = None,
    truncate_dim: int | None = None,
    merge: bool = True,
    scale: float = 1.0,
) -> tuple[SentenceTransformer, str]:
    """Load an adapter on its base model in float32, and check that every weight arrived.

    The arguments are those of `LoraEmbedding`, and `scale` its `adapter_scale`. Prompts, pooling, windows and length
    are those in the adapter's files. An adapter of peft alone records none of them, and is loaded on what `load_base`
    gives, but with its own tokenizer if it has another.

    Returns:
        The model, and its `fingerprint`.

    Raises:
        AdapterError: The weights do not fit the base model, or have no effect.
        ConfigError: `truncate_dim` does not fit, `pooling` or `window` is not what the adapter was trained with,
            nobody knows with which pooling it was trained, or an adapter that is more than plain LoRA was to be scaled.
    """
    from llama_index_lora_embed.models.windows import check_prompts, window_of

    directory, base = adapter.directory, adapter.base
    if scale != 1 and (more := adapter.more_than_lora()):
        raise ConfigError(
            f"adapter_scale={scale!r} for an adapter with {', '.join(more)}",
            "plain LoRA, which can be scaled",
            "Leave adapter_scale=1.",
        )
    bare: SentenceTransformer | None = None
    if adapter.of_peft_alone:
        check_pooling_known(adapter, pooling)
        loading: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
        bare = load_base(base, pooling=pooling, window=window, tokenizer_folder=adapter.tokenizer_folder(), **loading)
    with tempfile.TemporaryDirectory() as folder:
        # sentence-transformers finds the base model by the adapter's config alone, and ignores some names of weights
        copy = Path(folder) / "adapter"
        shutil.copytree(directory, copy, copy_function=shutil.copyfile)  # writable, even if the adapter is read-only
        config = {**adapter.config, "base_model_name_or_path": str(base.path), "revision": None}
        (copy / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        rename_magnitudes(copy / WEIGHTS_NAME)
        try:
            if bare is None:
                model = load_sentence_transformer(str(copy), device, trust_remote_code)
            else:
                model = bare
                model.load_adapter(str(copy))
        except Exception as error:  # wrong shapes and names raise many kinds of errors
            raise does_not_load(directory, base, error) from error
    check_keys(model, directory)
    check_effect(adapter)
    for name, wanted, trained in (("pooling", pooling, pooling_of(model)), ("window", window, window_of(model))):
        if wanted is not None and wanted != trained:
            raise ConfigError(
                f"{name}={wanted!r} for an adapter that was trained with {trained!r}",
                f"the {name} that the adapter was trained with",
                f"Leave {name}=None, or train an adapter with {name}={wanted!r}.",
            )
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


def check_poolable(adapter: OpenedAdapter, model: SentenceTransformer, pooling: str | None) -> None:
    """Check that an adapter can share its loaded base model, which was loaded with `pooling`, with other adapters.

    Raises:
        ConfigError: The adapter is more than plain LoRA, has other modules after the transformer than the model or
            another tokenizer, or nobody knows with which pooling it was trained.
    """
    check_pooling_known(adapter, pooling)
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
    folder = adapter.tokenizer_folder()
    if folder and tokenizer_digest(load_tokenizer(folder, pooling_of(model))) != tokenizer_digest(model.tokenizer):
        raise ConfigError(
            f"the adapter {str(directory)!r} with another tokenizer than its base model",
            "an adapter with the base model's tokenizer",
            f"{alone} Without its tokenizer files, it takes the base model's.",
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
    # transformers keeps the renamings of the adapter's file, and would save the weights under its names
    transformer._weight_conversions = None  # type: ignore[assignment]
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
