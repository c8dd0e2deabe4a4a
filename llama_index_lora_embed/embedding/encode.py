"""Texts to vectors: longest first, so many tokens at once, each text with the adapter that it names."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
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

NO_ADAPTER = "__base__"
"""peft's name for no adapter in a mixed batch."""
# measured with MiniLM on two cores (benchmarks/README.md); an accelerator needs more to be busy
_TOKENS_AT_ONCE = {"cpu": 2048}
_TOKENS_ON_ACCELERATORS = 65_536
_TOKENS_OF_A_CORE = 1024
# that are worth a thread: of a pass, Python's part takes some milliseconds, and threads wait for each other in it
_FEWEST_CHARACTERS, _FEWEST_TEXTS = 1500, 4
_SAMPLE = 1000  # characters that show how many tokens there are in others
_ROWS = threading.local()  # what `_adapters` reads: each thread computes another pass


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
        most_tokens: In all forward passes that are computed at once, padding included; None for `tokens_at_once`, or
            1,024 for each core. A longer text goes alone.
        most_texts: In a forward pass.
        unit_length: Scale vectors to length 1, after `model.truncate_dim` has cut them.
        fused: On processors, take oneDNN's matrix products where they are faster (`onednn_linear`), and compute a pass
            on each core at once (`parallel_passes`).

    Returns:
        float32 [texts, dimension].
    """
    prompt = model.prompts.get(task) if prompt is None else prompt
    order = longest_first(texts)
    limit = model.max_seq_length or 512
    most = most_texts or len(order)
    placed: list[int] = []
    per_character, start = 1.0, 0  # tokens, as the batch before has shown; most scripts have fewer than characters
    if len(order) > 1:
        sample = texts[order[0]][:_SAMPLE]
        seen, _ = _tokens(model.preprocess([sample], prompt=None, task=task))
        per_character = min(1.0, seen / max(1, len(sample))) if seen < limit else 1.0
    modules = list(model.modules()) if isinstance(model, nn.Module) else []  # once: it takes a millisecond
    if any(module.training for module in modules):
        model.eval()
    fused = fused and bool(modules)
    threads = max_parallel_passes(model.device, modules) if fused else 1
    if min(len(texts) // _FEWEST_TEXTS, sum(map(len, texts)) // _FEWEST_CHARACTERS) < threads:
        threads = 1  # and all cores share a pass
    if threads > 1:
        most_tokens = _TOKENS_OF_A_CORE if most_tokens is None else max(1, most_tokens // threads)
    most_tokens = most_tokens or tokens_at_once(model.device)
    added = 0
    with (
        torch.inference_mode(),
        onednn_linear(modules) if fused else nullcontext(),
        nullcontext() if adapters is None else _adapters(modules, {*adapters}),
        parallel_passes(threads) as passes,
    ):
        while start < len(order):
            characters = len(texts[order[start]]) + len(prompt or "")
            width = min(limit, math.ceil(characters * per_character) + 8)
            idle = threads - added % threads  # what is left is shared out among them
            count = min(most, math.ceil((len(order) - start) / idle), max(1, most_tokens // width))
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
            compute = partial(_vectors, model, features, names, task, unit_length)
            passes.add(compute, alone=tokens > most_tokens)  # a longer text takes all memory
            added += 1
            placed += batch
            start += count
        made = passes.results()
    if not made:
        return np.zeros((0, model.get_embedding_dimension() or 0), dtype=np.float32)
    out = np.empty((len(texts), made[0].shape[1]), dtype=np.float32)
    out[placed] = torch.cat(made).numpy()
    return out


@torch.inference_mode()
def _vectors(
    model: SentenceTransformer, features: dict[str, Any], names: list[str] | None, task: Task, unit_length: bool
) -> torch.Tensor:
    """float32 [texts, dimension] of one forward pass, on the processor."""
    _ROWS.of_pass = None if names is None else _Rows(names)
    try:
        vectors: torch.Tensor = model(batch_to_device(features, model.device), task=task)["sentence_embedding"]
    finally:
        _ROWS.of_pass = None
    if model.truncate_dim is not None:
        vectors = truncate_embeddings(vectors, model.truncate_dim)
    if unit_length:
        vectors = nn.functional.normalize(vectors, dim=-1)
    return vectors.float().cpu()


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


class _Rows:
    """Which adapter each row of a batch is computed with.

    Attributes:
        names: Of each row, or `NO_ADAPTER`.
        runs: Of neighbours with one adapter its name, and how many they are.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.runs = [(name, len(list(neighbours))) for name, neighbours in groupby(names)]


@contextmanager
def _adapters(modules: Sequence[nn.Module], names: set[str]) -> Iterator[None]:
    """Within it, peft's layers compute each row of a pass with the adapter that `_ROWS.of_pass` has for it.

    What `PeftModel.forward(adapter_names=...)` does; a model that got its adapters by `load_adapter`, as those of
    sentence-transformers do, has no such argument. Linear layers, nearly all, add the products of neighbouring rows in
    place, which takes a few operations for each adapter less than peft's copies of rows do.
    """
    hooks, changed, disabled = [], [], []
    try:
        for module in modules:
            base: Any = module.get_base_layer() if type(module) is LoraLinear and not module.merged else None
            if type(module) is LoraLinear and type(base) is nn.Linear:
                module.__dict__["forward"] = partial(_linear, base, _products(module, names))
                changed.append(module)
            elif isinstance(module, LoraLayer):
                if module.disable_adapters:  # which peft looks at before it looks at names
                    module._disable_adapters = False
                    disabled.append(module)
                hooks.append(module.register_forward_pre_hook(_with_names, with_kwargs=True))
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]
        for module in disabled:
            module._disable_adapters = True
        for hook in hooks:
            hook.remove()


def _products(layer: LoraLinear, names: set[str]) -> dict[str, _Product]:
    """What the layer's adapters multiply with: [in, rank], [rank, out], and the scale of their product."""
    down: Any = layer.lora_A
    up: Any = layer.lora_B
    return {name: (down[name].weight.T, up[name].weight.T, layer.scaling[name]) for name in names & down.keys()}


def _rows_of_pass() -> _Rows:
    rows: _Rows | None = getattr(_ROWS, "of_pass", None)
    if rows is None:
        raise ConfigError(
            "a model that is called from another thread while it embeds",
            "calls of the embedding model alone",
            "Embed through its own methods: get_text_embedding_batch, get_mixed_embeddings.",
        )
    return rows


def _linear(base: nn.Linear, products: dict[str, _Product], x: torch.Tensor) -> torch.Tensor:
    rows = _rows_of_pass()
    runs, count = rows.runs, len(rows.names)
    if len(runs) > 1 and len(x) != count:
        raise ConfigError(
            f"a layer that gets {len(x)} rows for a batch of {count} texts",
            "a model whose layers keep texts apart, to mix adapters in a batch",
            "Embed the texts of each adapter by themselves: LoraEmbedding(path).",
        )
    y: torch.Tensor = base(x)
    flat: Any = x.reshape(-1, x.shape[-1])
    out: Any = y.view(-1, y.shape[-1])
    tokens = len(flat) // count  # of a row, where there are several adapters
    sizes = [len(flat)] if len(runs) == 1 else [size * tokens for _, size in runs]
    for (name, _), part, made in zip(runs, flat.split(sizes), out.split(sizes), strict=True):
        if name in products:
            down, up, scale = products[name]
            if torch.is_autocast_enabled(x.device.type):  # which has no product in place
                made.add_((part @ down) @ up, alpha=scale)
            else:
                made.addmm_(part @ down, up, alpha=scale)
    return y


def _with_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": _rows_of_pass().names}
