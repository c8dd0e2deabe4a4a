"""Windows: a text that is longer than a window is split, and its vector is the mean of the windows' vectors.

Without windows a model truncates a text at its last position, so that the end of a node is missing from the index. A
base model that was trained on 128 tokens also finds more with shorter windows: on tenk, nDCG@10 is 0.697 with windows
of 192 tokens and 0.652 with texts of 512 (`benchmarks/README.md`). Attention, whose time grows with the square of the
length, takes less time.

The two modules are saved with a model like all modules of sentence-transformers. `LoraEmbedding` loads them without
further arguments; `SentenceTransformer(path, trust_remote_code=True)` loads them where this package is installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from llama_index_lora_embed.config import SHORTEST_WINDOW
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.tokens import count_tokens, longest_input

COUNTS = "windows"
"""Key in the features: number of windows of each text, int [texts]; absent if each text is one window."""
LONGEST_TEXT = 8192
"""Tokens beyond which a text is truncated despite windows, which bounds its memory; a base model with more positions
reads that many."""


class WindowedTransformer(Transformer):
    """A transformer that splits texts into windows of nearly equal length, of `window` tokens at most.

    Every window begins and ends with the model's special tokens and has the prompt, like a text of its own.
    `max_seq_length`, initially `text_length`, is the number of tokens of a text that are read, in all windows together.
    """

    config_keys: list[str] = [*Transformer.config_keys, "window", "text_length"]  # noqa: RUF012  # as in the parent

    def __init__(self, *args: Any, window: int, text_length: int = LONGEST_TEXT, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_window(window, text_length)

    def set_window(self, window: int, text_length: int) -> None:
        """Set the tokens in a window, and the tokens of a text that are read."""
        self.window = window
        self.max_seq_length = text_length
        # computed once: each call changes the tokenizer's truncation, on which another thread may rely
        self._head, self._tail = _special_tokens(self.tokenizer)

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text that are read, special tokens included; Transformer's own stops at the last position."""
        return self.text_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.text_length = value
        tokenizer: Any = self.tokenizer
        tokenizer.model_max_length = value

    def _should_flatten_inputs(self, *args: Any, **kwargs: Any) -> bool:
        """False: each window stays a row; flash attention uses the mask."""
        return False

    def preprocess(self, inputs: Any, prompt: str | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Token tensors [windows, tokens], with `COUNTS` if a text has several windows.

        Raises:
            ConfigError: The prompt leaves no room in a window.
        """
        features: dict[str, Any] = super().preprocess(inputs, prompt, *args, **kwargs)
        if not features or features["input_ids"].shape[1] <= self.window:
            return features
        tokenizer: Any = self.tokenizer
        tail = self._tail
        # the same in every row; if the tokenizer joins its last token with the text, that token is repeated
        opening = int(features.get("prompt_length") or len(self._head))
        room = self.window - opening - len(tail)
        if room < SHORTEST_WINDOW // 2:
            raise ConfigError(
                f"a window of {self.window} tokens for a prompt of {opening}",
                f"at least {SHORTEST_WINDOW // 2} tokens for the text itself",
                "Use a longer window or a shorter prompt.",
            )
        rows: list[list[int]] = []
        counts = []
        for ids, mask in zip(features["input_ids"].tolist(), features["attention_mask"].tolist(), strict=True):
            row = [number for number, there in zip(ids, mask, strict=True) if there]
            parts = _parts(row[opening : len(row) - len(tail)], room)
            rows += [[*row[:opening], *part, *tail] for part in parts]
            counts.append(len(parts))
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        shape = features["input_ids"].shape
        split = {name: value for name, value in features.items() if getattr(value, "shape", ())[:2] != shape}
        split |= {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
        if "token_type_ids" in features:
            split["token_type_ids"] = torch.zeros_like(padded["input_ids"])
        split[COUNTS] = torch.tensor(counts)
        return split

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Transformer's forward, with a window in each row."""
        counts = features.pop(COUNTS, None)  # models with **kwargs would be passed it
        features = super().forward(features, **kwargs)
        if counts is not None:
            features[COUNTS] = counts
        return features


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens before and after a text."""
    for probe in ("a", "the", "1", "."):
        inner = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        for at in range(len(whole) - len(inner) + 1 if inner else 0):
            if whole[at : at + len(inner)] == inner:
                return whole[:at], whole[at + len(inner) :]
    raise ConfigError(
        f"a {type(tokenizer).__name__} that encodes texts differently with special tokens",
        "a tokenizer that puts its special tokens before and after a text",
        "Leave window=None.",
    )


def _parts(content: list[int], room: int) -> list[list[int]]:
    """Content in as few parts as possible, whose lengths differ by at most one."""
    count = max(1, math.ceil(len(content) / room))
    return [content[i * len(content) // count : (i + 1) * len(content) // count] for i in range(count)]


class JoinWindows(Module):
    """Averages the vectors of a text's windows, which have nearly equal lengths.

    `window`, the tokens in a window, is only recorded, in the manifest and the fingerprint.
    """

    config_keys: list[str] = ["window"]  # noqa: RUF012  # as in the parent

    def __init__(self, window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Replace "sentence_embedding" [windows, dimension] by [texts, dimension].

        Without gradients, token embeddings, ids and mask are joined to those of whole texts too, for
        `encode(output_value="token_embeddings")`.
        """
        counts = features.pop(COUNTS, None)
        if counts is None:
            return features
        vectors: Tensor = features["sentence_embedding"]
        texts = torch.arange(len(counts), device=vectors.device)
        owner = torch.repeat_interleave(texts, counts, output_size=len(vectors))
        sums = vectors.new_zeros(len(counts), vectors.shape[1], dtype=torch.float32)
        means = sums.index_add(0, owner, vectors.float()) / counts[:, None]
        features["sentence_embedding"] = means.to(vectors.dtype)
        if not torch.is_grad_enabled():
            there = features["attention_mask"].bool()
            lengths = [int(part.sum()) for part in there.sum(dim=1).split(counts.tolist())]  # in all windows of a text
            for name in ("token_embeddings", "input_ids", "token_type_ids", "attention_mask"):
                if name in features and features[name].shape[:2] == there.shape:
                    parts = features[name][there].split(lengths)
                    features[name] = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the configuration; the module has no weights."""
        self.save_config(output_path)


MODULES: Mapping[str, type[nn.Module]] = {
    f"{package}.{module.__name__}": module
    for package in (__name__, "llama_index_lora_embed.windows")  # the second is in directories of development versions
    for module in (WindowedTransformer, JoinWindows)
}
"""Names of the two modules in modules.json."""


def window_of(model: SentenceTransformer) -> int | None:
    """Tokens in a window of this model; None for a model without windows."""
    return getattr(model[0], "window", None)


def windows_in(model: SentenceTransformer, texts: list[str], prompt: str = "") -> list[int]:
    """Number of windows of each text; 1 each for a model without windows."""
    window = window_of(model)
    if window is None or not texts:
        return [1] * len(texts)
    overhead, *lengths = count_tokens(model, ["", *texts], prompt)
    room = max(1, window - overhead)
    return [max(1, math.ceil((min(n, model.max_seq_length or n) - overhead) / room)) for n in lengths]


def longest_text(model: SentenceTransformer) -> int:
    """Highest `max_seq_length` that a model supports."""
    limit = longest_input(model)
    return limit if window_of(model) is None else max(limit, LONGEST_TEXT)


def check_prompts(model: SentenceTransformer, prompts: Mapping[str, str | None] | None = None) -> None:
    """Check that both prompts leave room for text in a window; otherwise the first long text would show it.

    Raises:
        ConfigError: A prompt, of `prompts` or else of the model, leaves too little room.
    """
    window = window_of(model)
    if window is not None:
        prompts = prompts or model.prompts
        for prompt in {prompts.get(task) or None for task in ("query", "document")}:
            model.preprocess(["a " * window], prompt=prompt)


def takes_windows(model: SentenceTransformer) -> bool:
    """Whether `add_windows` can be called on a model, and would let it read more of a text."""
    if window_of(model) is not None or _after_which(model) is None or longest_input(model) >= LONGEST_TEXT:
        return False
    try:
        _special_tokens(model.tokenizer)
    except ConfigError:
        return False
    return True


def _after_which(model: SentenceTransformer) -> int | None:
    """Position of a text encoder's pooling; None for another kind of model."""
    first: Any = model[0]
    if type(first) is not Transformer or "message" in first.modalities:
        return None
    return next((i for i, module in enumerate(model) if isinstance(module, Pooling)), None)


def add_windows(model: SentenceTransformer, window: int) -> None:
    """Make a model split long texts into windows, in place, and raise its `max_seq_length` to `longest_text`.

    Args:
        model: A Transformer, a Pooling and possibly further modules.
        window: Tokens in a window, special tokens and prompt included.

    Raises:
        ConfigError: The window is longer than the model's positions allow or shorter than `SHORTEST_WINDOW`, or the
            model has other modules or windows already.
    """
    limit = longest_input(model)
    if not SHORTEST_WINDOW <= window <= limit:
        raise ConfigError(
            f"window={window}",
            f"{SHORTEST_WINDOW} to {limit} tokens, the limit of the base model's positions",
            "window=None truncates texts instead.",
        )
    if window_of(model) is not None:
        raise ConfigError(
            f"window={window} for a model that was saved with windows of {window_of(model)}",
            "the model's own windows",
            "Leave window=None, or start from the base model without windows.",
        )
    first: Any = model[0]
    at = _after_which(model)
    if at is None:
        raise ConfigError(
            f"window={window} for a model of {', '.join(type(module).__name__ for module in model)}",
            "a text encoder: a Transformer and a Pooling, without a chat template",
            "Leave window=None.",
        )
    first.__class__ = WindowedTransformer  # in place, so that the weights are not copied
    first.set_window(window, max(limit, LONGEST_TEXT))
    named = list(model._modules.items())
    named.insert(at + 1, ("windows", JoinWindows(window)))
    if all(name.isdigit() for name, _ in named if name != "windows"):
        # numbered as by sentence-transformers; the keyword arguments of a module move with it
        kwargs = getattr(model, "module_kwargs", None)
        if kwargs:
            model.module_kwargs = {str(i): kwargs[name] for i, (name, _) in enumerate(named) if name in kwargs}
        named = [(str(i), module) for i, (_, module) in enumerate(named)]
    model._modules.clear()
    model._modules.update(named)
