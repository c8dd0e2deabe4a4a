"""Merge adapters that were trained on one base into one adapter, by arithmetic on their weight changes."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from llama_index_lora_embed.core.errors import AdapterError, BaseModelMismatchError, ConfigError
from llama_index_lora_embed.core.files import absolute, file_digest
from llama_index_lora_embed.models.adapter_directory import WEIGHTS_NAME, Manifest, check_output, write_adapter
from llama_index_lora_embed.models.lora_adapter import load_adapter
from llama_index_lora_embed.models.opened_adapter import OpenedAdapter, open_adapter

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    Factors = dict[str, tuple[Tensor, Tensor]]
    """Module to lora_A [rank, inputs] and scaled lora_B [outputs, rank]; lora_B lora_A is its weight change."""

Combination = Literal["linear", "ties", "dare_linear", "dare_ties"]
DENSITY = 0.2
"""Share of a weight change that TIES keeps: what its paper recommends without validation data (k = 20 %, lambda = 1;
arXiv 2306.01708). DARE drops the other 80 %, which its paper finds harmless (arXiv 2311.03099)."""


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that was merged.

    Attributes:
        path: The adapter directory.
        fingerprint: Fingerprint of the model in it.
        weights: Weight of each adapter.
        rank: Largest rank of a module.
        kept: Share of the merged weight changes that this rank holds, by their squared norm; 1 if nothing was lost.
    """

    path: str
    fingerprint: str
    weights: tuple[float, ...]
    rank: int
    kept: float

    def __str__(self) -> str:
        exact = "exact" if self.kept == 1 else f"{self.kept:.1%} of the squared weight changes"
        weights = ", ".join(f"{weight:g}" for weight in self.weights)
        return f"adapters merged with weights {weights} in {self.path} (rank {self.rank}, {exact})"


def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    model_output_path: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    combination: Combination = "linear",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    max_seq_length: int | None = None,
    pooling: str | None = None,
    base_model: str | None = None,
    cache_folder: str | None = None,
    trust_remote_code: bool = False,
) -> MergedAdapter:
    """Merge adapters of one base into one: several domains in one adapter, or several runs averaged.

    The mean of several adapters forgets less than each of them (LM-Cocktail, Xiao et al. 2023, arXiv 2311.13534; model
    soups, Wortsman et al. 2022, arXiv 2203.05482). Weights that add up to less than 1 mix with the base.

    What is combined are the weight changes, scaling x lora_B lora_A of each module:

    - "linear" gives exactly their weighted sum: the factors are concatenated, so that ranks add up and may differ
      (peft's "cat"). It is not peft's "linear", which averages lora_A and lora_B separately: the product of the
      averages has terms lora_B of one adapter times lora_A of another, and is not the mean of the weight changes.
    - "ties" keeps the largest entries of each weight change, elects a sign for each entry by the weighted sum, and
      averages those that agree (TIES, Yadav et al. 2023, arXiv 2306.01708), for each module as in peft.
    - "dare_linear" and "dare_ties" drop random entries and rescale the rest (DARE, Yu et al. 2023, arXiv 2311.03099),
      then continue with the weighted sum or the election.

    The last three give changes of full rank, of which the largest singular values are kept: `MergedAdapter.kept` is how
    much that is. Where all adapters agree, TIES gives their weighted sum, too: the mean of those that agree is
    multiplied by the sum of the weights (the paper's lambda). One adapter alone is only scaled, by any combination.

    Args:
        adapters: Folders or Hub ids of plain LoRA adapters, written by this package, sentence-transformers or peft.
        model_output_path: Folder to write; an adapter that is there is kept as `<name>.previous`.
        weights: Factor of each adapter, negative ones too; None for 1/n each.
        combination: "linear", "ties", "dare_linear" or "dare_ties".
        density: Share of the entries that TIES or DARE keeps, above 0 and at most 1; None for `DENSITY`.
        rank: Largest rank, by truncating singular values; None for the sum of the adapters' ranks.
        seed: Random seed of DARE.
        max_seq_length: Tokens per text of the merged adapter; needed only if those of the adapters differ.
        pooling: Pooling mode of adapters of peft whose files and bases name none (one of `config.POOLING_MODES`).
        base_model: Folder or Hub id of the base, if it has moved.
        cache_folder: Cache folder of huggingface_hub.
        trust_remote_code: Run Python code from the base model's repository.

    Returns:
        The adapter directory, with the adapters and their weights as `parents` in its manifest.

    Raises:
        ConfigError: An argument is wrong, an adapter is more than plain LoRA, or prompts, pooling, windows or lengths
            of the adapters differ.
        BaseModelMismatchError: The adapters were trained on different bases.
        AdapterError: An adapter is damaged, or does not fit the base.
        ModelNotFoundError: An adapter or the base does not exist.
        OutputDirectoryError: The output cannot be written; its content is unchanged.

    Example:
        >>> merge_adapters(["runs/legal", "runs/hr"], "runs/both", weights=[0.6, 0.4])  # doctest: +SKIP
        >>> embed_model = LoraEmbedding("runs/both")  # doctest: +SKIP
    """
    import torch

    places = check_adapters(adapters)
    factors = check_weights(weights, len(places))
    if not any(factors):
        raise ConfigError(
            f"weights={list(factors)}, all of them 0",
            "at least one other weight",
            "The base is LoraEmbedding(base_model=...).",
        )
    _check_settings(combination, density, rank, max_seq_length)
    target = check_output(model_output_path)
    opened = [open_adapter(place, base_model=base_model, cache_folder=cache_folder) for place in places]
    _check_mergeable(opened, places, max_seq_length)
    # an adapter of peft alone records no prompts and no pooling, and takes those of another or of the base
    source = next((adapter for adapter in opened if adapter.modules() is not None), opened[0])
    model, _ = load_adapter(source, device="cpu", merge=False, pooling=pooling, trust_remote_code=trust_remote_code)
    _set_length(model, max_seq_length)
    used = [(_read_factors(a, model), weight) for a, weight in zip(opened, factors, strict=True) if weight != 0]
    density = DENSITY if density is None else density
    merged, kept = _merge_factors(used, combination if len(used) > 1 else "linear", density, rank, seed)
    _set_factors(model, merged, dropout=max(float(a.config.get("lora_dropout") or 0) for a in opened))
    sparse = {} if combination == "linear" else {"density": density, "seed": seed}
    manifest = Manifest.of(
        model,
        source.base.to_dict(),
        tune=source.tune(),
        parents=[
            {"path": place, "fingerprint": a.manifest.fingerprint if a.manifest else None, "weight": weight}
            for place, a, weight in zip(places, opened, factors, strict=True)
        ],
        dataset=_trained_on([a for a, weight in zip(opened, factors, strict=True) if weight != 0]),
        settings={"combination": combination, "rank": rank, "kept": kept, **sparse},
        verdict="NOT EVALUATED: merged from other adapters.",
        best_step=None if any(bool(torch.any(up)) for _, up in merged.values()) else 0,
    )
    written = write_adapter(model, target, manifest, source.base.weights_sha256)
    return MergedAdapter(str(target), written.fingerprint, factors, max(len(down) for down, _ in merged.values()), kept)


def _trained_on(adapters: list[OpenedAdapter]) -> dict[str, Any]:
    """Origins of the training queries of all adapters, which a verdict asks for; empty unless all are known."""
    recorded = [{} if a.manifest is None else a.manifest.trained_on or {} for a in adapters]
    return {"origins": dict(sum(map(Counter, recorded), Counter()))} if all(recorded) else {}


def check_adapters(adapters: Any) -> list[str]:
    """Absolute paths, or Hub ids, of the adapters to merge.

    Raises:
        ConfigError: They are not a sequence of paths, or there are none.
    """
    listed = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    if not listed or not adapters or not all(isinstance(a, (str, os.PathLike)) and os.fspath(a) for a in adapters):
        raise ConfigError(
            f"adapters={adapters!r}",
            "a list of folders or Hub ids",
            'merge_adapters(["runs/legal", "runs/hr"], "runs/both")',
        )
    return [absolute(adapter) for adapter in adapters]


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite weight for each of the adapters; None for 1/count each.

    Raises:
        ConfigError: Their number differs, or some are not finite numbers.
    """
    if weights is None:
        return (1 / count,) * count
    listed = isinstance(weights, Sequence) and not isinstance(weights, str)
    if not listed or len(weights) != count or not all(map(_is_number, weights)):
        raise ConfigError(
            f"weights={weights!r} for {count} adapter(s)",
            "a finite number for each of them",
            "weights=None is their mean.",
        )
    return tuple(float(weight) for weight in weights)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_settings(combination: Any, density: Any, rank: Any, max_seq_length: Any) -> None:
    problems = []
    if combination not in get_args(Combination):
        problems.append(f"combination={combination!r}: expected one of {', '.join(get_args(Combination))}")
    if density is not None and combination == "linear":
        problems.append(f"density={density!r}: expected None, because 'linear' keeps every entry")
    elif density is not None and not (_is_number(density) and 0 < density <= 1):
        problems.append(f"density={density!r}: expected a number above 0 and at most 1")
    for name, value in (("rank", rank), ("max_seq_length", max_seq_length)):
        if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            problems.append(f"{name}={value!r}: expected a whole number of at least 1, or None")
    if problems:
        raise ConfigError(f"{len(problems)} wrong argument(s)", "valid ones", "Correct these:", problems)


def _check_mergeable(opened: list[OpenedAdapter], places: list[str], max_seq_length: int | None) -> None:
    """Check that adapters have one base, are plain LoRA, and have the same prompts, pooling, windows and length."""
    pairs = list(zip(places, opened, strict=True))
    if len({adapter.base.weights_sha256 for adapter in opened}) > 1:
        raise BaseModelMismatchError(
            "adapters of different base models",
            "adapters that were trained on the same weights",
            "Merge those that share a base:",
            [f"{place}: {a.base.model_id} (weights {a.base.weights_sha256[:12]}...)" for place, a in pairs],
        )
    if more := [f"{place}: {', '.join(found)}" for place, a in pairs if (found := a.more_than_lora())]:
        raise ConfigError(
            "adapters that are more than plain LoRA",
            "plain LoRA, whose weight changes can be added",
            "Leave these out:",
            more,
        )
    recorded = [(place, _settings_of(a)) for place, a in pairs if a.modules() is not None]
    differing = []
    for name in dict.fromkeys(name for _, settings in recorded for name in settings):
        values = {place: settings.get(name) for place, settings in recorded}
        if len({repr(value) for value in values.values()}) > 1 and not (name == "max_seq_length" and max_seq_length):
            differing.append(f"{name}: " + ", ".join(f"{value!r} in {place}" for place, value in values.items()))
    if differing:
        length = any(line.startswith("max_seq_length: ") for line in differing)
        raise ConfigError(
            "adapters with different settings",
            "adapters that embed a text in the same way",
            ("Pass max_seq_length=, e.g. the longest. " if length else "") + "Train the adapters with the same:",
            differing,
        )


def _settings_of(adapter: OpenedAdapter) -> dict[str, Any]:
    """What decides vectors besides base and LoRA, by name."""
    prompts, modules = adapter.prompts(), adapter.modules() or []
    settings: dict[str, Any] = {
        "query prompt": prompts["query"],
        "passage prompt": prompts["document"],
        "max_seq_length": adapter.max_seq_length(),
        "tune": adapter.tune(),
        "modules": ", ".join(module["type"] for module in modules),
    }
    settings |= {f"{m['type']}.{name}": value for m in modules for name, value in m.items() if name != "type"}
    heads = (path for path in adapter.directory.rglob("*.safetensors") if path.name != WEIGHTS_NAME)
    return settings | {path.relative_to(adapter.directory).as_posix(): file_digest(path)[:12] for path in heads}


def _set_length(model: SentenceTransformer, max_seq_length: int | None) -> None:
    from llama_index_lora_embed.models.windows import longest_text

    if max_seq_length is None:
        return
    if max_seq_length > (limit := longest_text(model)):
        raise ConfigError(
            f"max_seq_length={max_seq_length}", f"at most {limit}, the base's limit", f"max_seq_length={limit}"
        )
    model.max_seq_length = max_seq_length


def _read_factors(adapter: OpenedAdapter, model: SentenceTransformer) -> Factors:
    """The factors of an adapter's weight changes, in float32.

    Raises:
        AdapterError: They are not finite, or not factors of the linear modules of the model.
    """
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file

    down_end, up_end = ".lora_A.weight", ".lora_B.weight"
    stored = {
        key.removeprefix("base_model.model."): t for key, t in load_file(adapter.directory / WEIGHTS_NAME).items()
    }
    modules = {key.removesuffix(end) for key in stored for end in (down_end, up_end) if key.endswith(end)}
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.transformers_model.named_modules()  # type: ignore[union-attr]
        if hasattr(module, "out_features")
    }
    alphas: dict[str, float] = adapter.config.get("alpha_pattern") or {}
    wrong = [key for key in stored if not key.endswith((down_end, up_end))]
    factors: Factors = {}
    for module in sorted(modules):
        down, up = stored.get(module + down_end), stored.get(module + up_end)
        outputs, inputs = shapes.get(module, (0, 0))
        if (
            down is None
            or up is None
            or (*up.shape, *down.shape) != (outputs, len(down), len(down), inputs)
            or not bool(down.isfinite().all() and up.isfinite().all())
        ):
            wrong.append(module)
            continue
        alpha = alphas.get(get_pattern_key(list(alphas), module), float(adapter.config.get("lora_alpha", 8)))
        scaling = alpha / (math.sqrt(len(down)) if adapter.config.get("use_rslora") else len(down))
        factors[module] = down.float(), up.float() * scaling
    if wrong:
        raise AdapterError(
            f"the adapter {str(adapter.directory)!r}, of which {len(wrong)} weight(s) do not fit (e.g. {wrong[0]})",
            "finite lora_A and lora_B of linear modules of the base",
            "Check that the base model is the right one, or train again.",
        )
    return factors


def _merge_factors(
    used: list[tuple[Factors, float]], combination: str, density: float, rank: int | None, seed: int
) -> tuple[Factors, float]:
    """Factors of the merged weight changes with scaling 1, and the share of their squared norm that is kept."""
    import torch

    merged: Factors = {}
    kept = lost = 0.0
    strength = sum(abs(weight) for _, weight in used)
    with torch.random.fork_rng(devices=[]):  # peft draws from torch's global generator
        torch.default_generator.manual_seed(seed)
        for module in sorted({module for factors, _ in used for module in factors}):
            downs, ups, weights = zip(*[(*f[module], weight) for f, weight in used if module in f], strict=True)
            total = sum(map(len, downs))
            limit = min(rank or total, len(ups[0]), downs[0].shape[1])
            if combination == "linear" and total <= limit:
                down, up = torch.cat(downs), torch.cat([up * w for up, w in zip(ups, weights, strict=True)], dim=1)
                merged[module] = down, up
                kept += float(((up.T @ up) * (down @ down.T)).sum())
                continue
            changes = torch.stack([up @ down for up, down in zip(ups, downs, strict=True)])
            change = _combine(changes, torch.tensor(weights)[:, None, None], strength, combination, density)
            left, values, right = torch.linalg.svd(change, full_matrices=False)
            roots = values[:limit].sqrt()
            merged[module] = (roots[:, None] * right[:limit]).contiguous(), left[:, :limit] * roots
            kept += float(values[:limit].square().sum())
            lost += float(values[limit:].square().sum())
    return merged, kept / (kept + lost) if lost > 0 else 1.0


def _combine(changes: Tensor, weights: Tensor, strength: float, combination: str, density: float) -> Tensor:
    """Combine the weight changes of a module, [adapters, outputs, inputs], with weights [adapters, 1, 1].

    `strength` is the sum of the absolute weights of all adapters, also of those that leave this module unchanged.
    """
    import torch
    from peft.utils.merge_utils import calculate_majority_sign_mask, prune

    if density < 1 and combination != "linear":
        drops = combination != "ties"
        changes = torch.stack([prune(c, density, "random" if drops else "magnitude", rescale=drops) for c in changes])
    weighted = changes * weights
    if combination in ("linear", "dare_linear"):
        return weighted.sum(dim=0)
    agree = calculate_majority_sign_mask(weighted)
    shares = (weights.abs() * agree).sum(dim=0)
    # an entry that all have pruned is 0; elsewhere at least one agrees
    return strength * (weighted * agree).sum(dim=0) / torch.where(shares > 0, shares, 1.0)


def _set_factors(model: SentenceTransformer, factors: Factors, dropout: float) -> None:
    """Replace the adapter "default" of a model by one with these factors and scaling 1, in place."""
    from peft import LoraConfig, set_peft_model_state_dict

    ranks = {module: len(down) for module, (down, _) in factors.items()}
    largest = max(ranks.values())
    lower = {module: rank for module, rank in ranks.items() if rank < largest}
    model.delete_adapter("default")
    model.add_adapter(
        LoraConfig(
            r=largest,
            lora_alpha=largest,
            rank_pattern=lower,
            alpha_pattern=dict(lower),
            target_modules=list(factors),
            lora_dropout=dropout,
        )
    )
    weights: dict[str, Tensor] = {}
    for module, (down, up) in factors.items():
        weights |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    set_peft_model_state_dict(model.transformers_model, weights, adapter_name="default")
