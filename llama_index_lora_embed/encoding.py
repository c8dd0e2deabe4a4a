"""Texts to vectors: longest first, so many tokens at once, each text with the adapter that it names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from sentence_transformers.util import batch_to_device, truncate_embeddings
from torch import nn

from llama_index_lora_embed.errors import ConfigError
from llama_index_lora_embed.fast_linear import fast_linear
from llama_index_lora_embed.texts import longest_first
from llama_index_lora_embed.windows import COUNTS

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Task = Literal["query", "document"]
Vectors = npt.NDArray[np.float32]

NO_ADAPTER = "__base__"
"""peft's name for no adapter in a mixed batch."""
# measured with MiniLM on two cores (benchmarks/README.md); an accelerator needs more to be busy
_TOKENS_AT_ONCE = {"cpu": 2048}
_TOKENS_ON_ACCELERATORS = 65_536


def tokens_at_once(device: torch.device) -> int:
    """Tokens in a forward pass, padding included, where the user has not said how many."""
    return _TOKENS_AT_ONCE.get(device.type, _TOKENS_ON_ACCELERATORS)


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    task: Task,
    *,
    prompt: str | None = None,
    adapters: Sequence[str] | None = None,
    most_tokens: int | None = None,
    most_texts: int | None = None,
    unit_length: bool = False,
    fused: bool = True,
) -> Vectors:
    """What `model.encode_query` or `model.encode_document` gives, in batches of so many tokens.

    Args:
        model: Its prompts "query" and "document" are set.
        texts: Checked.
        task: Which of the two.
        prompt: Instead of the model's for this task.
        adapters: Of each text the name of the peft adapter, or `NO_ADAPTER`; None leaves those that are active.
        most_tokens: In a forward pass, padding included; None for `tokens_at_once`. A longer text goes alone.
        most_texts: In a forward pass.
        unit_length: Scale vectors to length 1, after `model.truncate_dim` has cut them.
        fused: Take oneDNN's matrix products where they are faster (`fast_linear`).

    Returns:
        float32 [texts, dimension].
    """
    most_tokens = most_tokens or tokens_at_once(model.device)
    prompt = model.prompts.get(task) if prompt is None else prompt
    order = longest_first(texts)
    limit = model.max_seq_length or 512
    most = most_texts or len(order)
    made: list[torch.Tensor] = []
    placed: list[int] = []
    per_character, start = 1.0, 0  # tokens, as the batch before has shown; most scripts have fewer than characters
    model.eval()
    faster = fast_linear(model) if fused and isinstance(model, nn.Module) else nullcontext()
    with torch.inference_mode(), faster:
        while start < len(order):
            characters = len(texts[order[start]]) + len(prompt or "")
            width = min(limit, math.ceil(characters * per_character) + 8)
            count = min(most, len(order) - start, max(1, most_tokens // width))
            batch = order[start : start + count]
            if adapters is not None:  # neighbours with one adapter are computed together
                batch.sort(key=adapters.__getitem__)
            features = model.preprocess([texts[i] for i in batch], prompt=prompt or None, task=task)
            seen, tokens = _tokens(features)
            if seen < limit:  # not cut
                per_character = seen / max(1, characters)
            if tokens > most_tokens and count > 1:  # another script has more tokens for as many characters
                most = max(1, min(count - 1, count * most_tokens // tokens))
                continue
            most = most_texts or len(order)
            names = None if adapters is None else _for_rows([adapters[i] for i in batch], features)
            with _adapters(model, names):
                vectors = model(batch_to_device(features, model.device), task=task)["sentence_embedding"]
            if model.truncate_dim is not None:
                vectors = truncate_embeddings(vectors, model.truncate_dim)
            if unit_length:
                vectors = nn.functional.normalize(vectors, dim=-1)
            made.append(vectors.float().cpu())
            placed += batch
            start += count
    if not made:
        return np.zeros((0, model.get_embedding_dimension() or 0), dtype=np.float32)
    out = np.empty((len(texts), made[0].shape[1]), dtype=np.float32)
    out[placed] = torch.cat(made).numpy()
    return out


def _tokens(features: dict[str, Any]) -> tuple[int, int]:
    """Of the longest text, and of all, padding included."""
    ids = features.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return 0, 0
    windows = int(features[COUNTS].max()) if COUNTS in features else 1
    return ids.shape[1] * windows, ids.numel()


def _for_rows(names: list[str], features: dict[str, Any]) -> list[str]:
    """An adapter's name for each row: a text that is read in windows has several."""
    if COUNTS not in features:
        return names
    return [name for name, count in zip(names, features[COUNTS].tolist(), strict=True) for _ in range(count)]


@contextmanager
def _adapters(model: nn.Module, names: list[str] | None) -> Iterator[None]:
    """Within it, peft's layers compute each row of a batch with the adapter of that name.

    What `PeftModel.forward(adapter_names=...)` does; a model that got its adapters by `load_adapter`, as those of
    sentence-transformers do, has no such argument. Linear layers, nearly all, add the products of neighbouring rows in
    place, which takes a few operations for each adapter less than peft's copies of rows do.
    """
    if names is None:
        yield
        return
    runs = _runs(names)
    hooks, changed, disabled = [], [], []
    try:
        for module in model.modules():
            if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear and not module.merged:
                module.forward = partial(_linear, module, runs, len(names))  # type: ignore[method-assign]
                changed.append(module)
            elif isinstance(module, LoraLayer):
                if module.disable_adapters:  # which peft looks at before it looks at names
                    module._disable_adapters = False
                    disabled.append(module)
                given = partial(_with_names, names=names)
                hooks.append(module.register_forward_pre_hook(given, with_kwargs=True))
        yield
    finally:
        for module in changed:
            del module.forward
        for module in disabled:
            module._disable_adapters = True
        for hook in hooks:
            hook.remove()


def _runs(names: list[str]) -> list[tuple[str, int, int]]:
    """Name, first row and last (exclusive) of neighbours with one adapter."""
    starts = [i for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    spans = zip(starts, [*starts[1:], len(names)], strict=True)
    return [(names[start], start, end) for start, end in spans if names[start] != NO_ADAPTER]


def _linear(layer: LoraLinear, runs: list[tuple[str, int, int]], rows: int, x: torch.Tensor) -> torch.Tensor:
    one = runs[0][0] if len(runs) == 1 and runs[0][2] - runs[0][1] == rows else None
    if one is None and runs and len(x) != rows:
        raise ConfigError(
            f"a layer that gets {len(x)} rows for a batch of {rows} texts",
            "a model whose layers keep texts apart, to mix adapters in a batch",
            "Embed the texts of each adapter by themselves: LoraEmbedding(path).",
        )
    y: torch.Tensor = layer.get_base_layer()(x)
    for name, start, end in runs if one is None else [(one, 0, len(x))]:
        if name in layer.lora_A:
            down: Any = layer.lora_A[name].weight
            up: Any = layer.lora_B[name].weight
            small = x[start:end].reshape(-1, x.shape[-1]) @ down.T
            y[start:end].view(-1, y.shape[-1]).addmm_(small, up.T, alpha=layer.scaling[name])
    return y


def _with_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}
