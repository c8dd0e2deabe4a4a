"""Encoding texts in batches of a limited number of tokens, the longest texts first, with one or several adapters."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from sentence_transformers.util import batch_to_device, truncate_embeddings
from torch import nn

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.kernels.linear import onednn_linear
from llama_index_lora_embed.models.kernels.parallel import max_parallel_passes, parallel_passes
from llama_index_lora_embed.models.tokens import longest_first
from llama_index_lora_embed.models.windows import COUNTS

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Task = Literal["query", "document"]
Vectors = npt.NDArray[np.float32]

_Product = tuple[torch.Tensor, torch.Tensor, float]
# names of the adapters of neighbouring rows, each with its number of rows
_Runs = list[tuple[str, int]]

NO_ADAPTER = "__base__"
"""peft's name for rows without an adapter in a mixed batch."""
# measured with MiniLM on two cores (benchmarks/README.md); accelerators are idle with so few
_TOKENS_ON_CPU = 2048
_TOKENS_ON_ACCELERATOR = 65_536
_TOKENS_PER_CORE = 1024
# fewer are not worth a thread: some milliseconds of each pass are Python code, in which threads wait for each other
_CHARACTERS_PER_THREAD, _TEXTS_PER_THREAD = 1500, 4
_SAMPLE = 1000  # characters from which the tokens per character are estimated
_PASS = threading.local()  # `_PASS.runs` are the adapters of the forward pass that the thread computes


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    task: Task,
    *,
    prompt: str | None = None,
    adapters: Sequence[str] | None = None,
    max_tokens: int | None = None,
    max_texts: int | None = None,
    unit_length: bool = False,
    fused: bool = True,
    progress: Callable[[int], object] | None = None,
) -> Vectors:
    """The vectors of `model.encode_query` or `model.encode_document`, computed in batches of a limited size.

    Args:
        model: Its prompts "query" and "document" are set.
        texts: From `check_texts`.
        task: "query" or "document"; selects the prompt.
        prompt: Overrides the model's prompt.
        adapters: For each text the name of a peft adapter or `NO_ADAPTER`; None for the active adapters.
        max_tokens: Tokens in all forward passes that run at the same time, padding included; None for 2,048 on CPUs, or
            1,024 per core, and 65,536 on accelerators. A longer text is computed alone.
        max_texts: Texts in a forward pass; None for no limit.
        unit_length: Scale vectors to length 1 after `model.truncate_dim` has truncated them.
        fused: On CPUs, use oneDNN's matrix products where they are faster (`onednn_linear`), and compute one pass per
            core at the same time (`parallel_passes`).
        progress: Called with the number of texts of each forward pass.

    Returns:
        float32 [texts, dimension].
    """
    prompt = model.prompts.get(task) if prompt is None else prompt
    order = longest_first(texts)
    limit = model.max_seq_length or 512
    most = max_texts or len(order)
    placed: list[int] = []
    per_character, start = 1.0, 0  # tokens per character, estimated from the batch before
    if len(order) > 1:
        sample = texts[order[0]][:_SAMPLE]
        seen, _ = _size(model.preprocess([sample], prompt=None, task=task))
        per_character = min(1.0, seen / max(1, len(sample))) if seen < limit else 1.0
    modules = list(model.modules()) if isinstance(model, nn.Module) else []  # listed once: it takes a millisecond
    if any(module.training for module in modules):
        model.eval()
    fused = fused and bool(modules)
    threads = max_parallel_passes(model.device, modules) if fused else 1
    if min(len(texts) // _TEXTS_PER_THREAD, sum(map(len, texts)) // _CHARACTERS_PER_THREAD) < threads:
        threads = 1  # all cores share a pass
    if threads > 1:
        max_tokens = _TOKENS_PER_CORE if max_tokens is None else max(1, max_tokens // threads)
    max_tokens = max_tokens or (_TOKENS_ON_CPU if model.device.type == "cpu" else _TOKENS_ON_ACCELERATOR)
    added = 0
    with (
        torch.inference_mode(),
        onednn_linear(modules) if fused else nullcontext(),
        nullcontext() if adapters is None else _mixed_adapters(modules, {*adapters}),
        parallel_passes(threads) as passes,
    ):
        while start < len(order):
            characters = len(texts[order[start]]) + len(prompt or "")
            width = min(limit, math.ceil(characters * per_character) + 8)
            idle = threads - added % threads  # the last texts are divided among all threads
            count = min(most, math.ceil((len(order) - start) / idle), max(1, max_tokens // width))
            batch = order[start : start + count]
            if adapters is not None:  # neighbours with the same adapter are computed together
                batch.sort(key=adapters.__getitem__)
            features = model.preprocess([texts[i] for i in batch], prompt=prompt or None, task=task)
            seen, tokens = _size(features)
            if seen < limit:  # not truncated
                per_character = seen / max(1, characters)
            if tokens > max_tokens and count > 1:  # another script with more tokens per character
                most = max(1, min(count - 1, count * max_tokens // tokens))
                continue
            most = max_texts or len(order)
            runs = None if adapters is None else _runs([adapters[i] for i in batch], features)
            compute = partial(_vectors, model, features, runs, task, unit_length)
            passes.add(compute, alone=tokens > max_tokens)  # a longer text needs all memory
            added += 1
            placed += batch
            if progress is not None:
                progress(count)
            start += count
        made = passes.results()
    if not made:
        return np.zeros((0, model.get_embedding_dimension() or 0), dtype=np.float32)
    out = np.empty((len(texts), made[0].shape[1]), dtype=np.float32)
    out[placed] = torch.cat(made).numpy()
    return out


@torch.inference_mode()
def _vectors(
    model: SentenceTransformer, features: dict[str, Any], runs: _Runs | None, task: Task, unit_length: bool
) -> torch.Tensor:
    """float32 [texts, dimension] of one forward pass, in main memory."""
    _PASS.runs = runs
    try:
        vectors: torch.Tensor = model(batch_to_device(features, model.device), task=task)["sentence_embedding"]
    finally:
        _PASS.runs = None
    if model.truncate_dim is not None:
        vectors = truncate_embeddings(vectors, model.truncate_dim)
    if unit_length:
        vectors = nn.functional.normalize(vectors, dim=-1)
    return vectors.float().cpu()


def _size(features: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the longest text, and of all texts, padding included."""
    ids = features.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return 0, 0
    windows = int(features[COUNTS].max()) if COUNTS in features else 1
    return ids.shape[1] * windows, ids.numel()


def _runs(names: list[str], features: dict[str, Any]) -> _Runs:
    """The adapters of the rows; a text in windows has several rows."""
    counts = features[COUNTS].tolist() if COUNTS in features else [1] * len(names)
    pairs = groupby(zip(names, counts, strict=True), key=lambda pair: pair[0])
    return [(name, sum(count for _, count in neighbours)) for name, neighbours in pairs]


@contextmanager
def _mixed_adapters(modules: Sequence[nn.Module], names: set[str]) -> Iterator[None]:
    """Within it, peft's layers compute each row of a pass with the adapter named in `_PASS.runs`.

    `PeftModel.forward(adapter_names=...)` does the same, but sentence-transformers' models are not `PeftModel`s and
    have no such argument. Linear layers, nearly all of them, add the products of neighbouring rows in place, which
    needs fewer operations per adapter than peft's copies of rows.
    """
    hooks, changed, disabled = [], [], []
    try:
        for module in modules:
            base: Any = module.get_base_layer() if type(module) is LoraLinear and not module.merged else None
            if type(module) is LoraLinear and type(base) is nn.Linear:
                module.__dict__["forward"] = partial(_linear, base, _products(module, names))
                changed.append(module)
            elif isinstance(module, LoraLayer):
                if module.disable_adapters:  # peft would ignore the names
                    module._disable_adapters = False
                    disabled.append(module)
                hooks.append(module.register_forward_pre_hook(_pass_names, with_kwargs=True))
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]
        for module in disabled:
            module._disable_adapters = True
        for hook in hooks:
            hook.remove()


def _products(layer: LoraLinear, names: set[str]) -> dict[str, _Product]:
    """For each adapter of the layer its matrices [in, rank] and [rank, out] and the scale of their product."""
    down: Any = layer.lora_A
    up: Any = layer.lora_B
    return {name: (down[name].weight.T, up[name].weight.T, layer.scaling[name]) for name in names & down.keys()}


def _current_runs() -> _Runs:
    runs: _Runs | None = getattr(_PASS, "runs", None)
    if runs is None:
        raise ConfigError(
            "a call of the model itself while the embedding model computes with several adapters",
            "calls of the embedding model only",
            "Use its methods: get_text_embedding_batch, get_mixed_embeddings.",
        )
    return runs


def _linear(base: nn.Linear, products: dict[str, _Product], x: torch.Tensor) -> torch.Tensor:
    runs = _current_runs()
    count = sum(size for _, size in runs)
    if len(runs) > 1 and len(x) != count:
        raise ConfigError(
            f"a layer with {len(x)} rows for a batch of {count} texts",
            "a model whose layers have one row per text, which mixed adapters require",
            "Embed the texts of each adapter separately: LoraEmbedding(path).",
        )
    y: torch.Tensor = base(x)
    flat: Any = x.reshape(-1, x.shape[-1])
    out: Any = y.view(-1, y.shape[-1])
    tokens = len(flat) // count  # per row, if there are several adapters
    sizes = [len(flat)] if len(runs) == 1 else [size * tokens for _, size in runs]
    for (name, _), part, made in zip(runs, flat.split(sizes), out.split(sizes), strict=True):
        if name in products:
            down, up, scale = products[name]
            if torch.is_autocast_enabled(x.device.type):  # autocast does not support addmm_
                made.add_((part @ down) @ up, alpha=scale)
            else:
                made.addmm_(part @ down, up, alpha=scale)
    return y


def _pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": [name for name, size in _current_runs() for _ in range(size)]}
