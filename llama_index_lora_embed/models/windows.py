"""Long texts in windows: a text of more tokens than a window is read whole, and its vector is the windows' mean.

A model reads what fits its positions and cuts the rest off. The end of a node is lost to the index, then, and near the
limit vectors are worse than in the middle: a base that was trained on 128 tokens finds more on tenk when a node is read
in windows of 192 than in one of 512 (nDCG@10 0.697 against 0.652, `benchmarks/README.md`). Attention, whose time grows
with the square of the length, costs less, too.

The two modules are saved with a model like any other of sentence-transformers'. `LoraEmbedding` loads them by itself;
`SentenceTransformer(path, trust_remote_code=True)` does where this package is installed.
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

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.prompts import SHORTEST_WINDOW, longest_input
from llama_index_lora_embed.models.tokens import count_tokens

COUNTS = "windows"
"""Key in the features: into how many windows each text went, int [texts]; absent where each is one."""
LONGEST_TEXT = 8192
"""Tokens of a text beyond which it is cut all the same, which bounds the memory that one text takes; more where the
base reads longer ones at once."""


class WindowedTransformer(Transformer):
    """A transformer whose texts are split into windows of nearly one length.

    Every window begins and ends with the model's special tokens, and has the prompt, as if it were a text by itself.
    `max_seq_length` is how many tokens of a text are read in all.

    Args:
        *args: As for Transformer.
        window: Tokens in a window at most, special tokens and prompt included.
        text_length: The first `max_seq_length`.
        **kwargs: As for Transformer.
    """

    config_keys: list[str] = [*Transformer.config_keys, "window", "text_length"]  # noqa: RUF012  # as in the parent

    def __init__(self, *args: Any, window: int, text_length: int = LONGEST_TEXT, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.split(window, text_length)

    def split(self, window: int, text_length: int) -> None:
        """Set how long a window is, and how much of a text is read."""
        self.window = window
        self.max_seq_length = text_length
        # once: each call changes the tokenizer's truncation, which another thread may be relying on
        self._head, self._tail = _frame(self.tokenizer)

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text that are read, special tokens included; the parent would stop at the last position."""
        return self.text_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.text_length = value
        tokenizer: Any = self.tokenizer
        tokenizer.model_max_length = value

    def _should_flatten_inputs(self, *args: Any, **kwargs: Any) -> bool:
        """Windows are rows; flash attention still has its mask to go by."""
        return False

    def preprocess(self, inputs: Any, prompt: str | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Token tensors [windows, tokens], with `COUNTS` where a text has more than one.

        Raises:
            ConfigError: The prompt leaves no room in a window.
        """
        features: dict[str, Any] = super().preprocess(inputs, prompt, *args, **kwargs)
        if not features or features["input_ids"].shape[1] <= self.window:
            return features
        tokenizer: Any = self.tokenizer
        tail = self._tail
        # of every row alike; where its last token runs into a text, that token is repeated with it
        opening = int(features.get("prompt_length") or len(self._head))
        room = self._room(opening)
        rows: list[list[int]] = []
        counts = []
        for ids, mask in zip(features["input_ids"].tolist(), features["attention_mask"].tolist(), strict=True):
            row = [number for number, there in zip(ids, mask, strict=True) if there]
            parts = _parts(row[opening : len(row) - len(tail)], room)
            rows += [[*row[:opening], *part, *tail] for part in parts]
            counts.append(len(parts))
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        split = {name: value for name, value in features.items() if not _is_rows(value, features["input_ids"])}
        split |= {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
        if "token_type_ids" in features:
            split["token_type_ids"] = torch.zeros_like(padded["input_ids"])
        split[COUNTS] = torch.tensor(counts)
        return split

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """As Transformer's, window by window."""
        counts = features.pop(COUNTS, None)  # a model that takes any keyword would take this one
        features = super().forward(features, **kwargs)
        if counts is not None:
            features[COUNTS] = counts
        return features

    def _room(self, opening: int) -> int:
        room = self.window - opening - len(self._tail)
        if room < SHORTEST_WINDOW // 2:
            raise ConfigError(
                f"a window of {self.window} tokens for a prompt of {opening}",
                f"at least {SHORTEST_WINDOW // 2} tokens for the text itself",
                "Take a longer window, or a shorter prompt.",
            )
        return room


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens before and after a text.

    Raises:
        ConfigError: They cannot be told from the text.
    """
    for probe in ("a", "the", "1", "."):
        inner = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        for at in range(len(whole) - len(inner) + 1 if inner else 0):
            if whole[at : at + len(inner)] == inner:
                return whole[:at], whole[at + len(inner) :]
    raise ConfigError(
        f"a {type(tokenizer).__name__} that writes texts differently between special tokens",
        "a tokenizer whose special tokens stand before and after a text",
        "Leave window=None.",
    )


def _parts(content: list[int], room: int) -> list[list[int]]:
    """Content in as few parts as hold it, whose lengths differ by one at most."""
    count = max(1, math.ceil(len(content) / room))
    return [content[i * len(content) // count : (i + 1) * len(content) // count] for i in range(count)]


def _is_rows(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == ids.shape


class JoinWindows(Module):
    """The vector of a text, which is the mean of its windows' vectors; they are of nearly one length.

    Args:
        window: Tokens in a window, so that a model's description says it.
    """

    config_keys: list[str] = ["window"]  # noqa: RUF012  # as in the parent

    def __init__(self, window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Replace "sentence_embedding" [windows, dimension] by [texts, dimension].

        Outside of training, token embeddings, ids and mask are those of whole texts afterwards, too, for
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
            for name in ("token_embeddings", "input_ids", "token_type_ids", "attention_mask"):
                if name in features and features[name].shape[:2] == there.shape:
                    parts = features[name][there].split(_lengths(there, counts))
                    features[name] = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """The configuration; there is nothing to learn here."""
        self.save_config(output_path)


def _lengths(there: Tensor, counts: Tensor) -> list[int]:
    """Tokens of each text, all of its windows together."""
    return [int(part.sum()) for part in torch.split(there.sum(dim=1), counts.tolist())]


MODULES: Mapping[str, type[nn.Module]] = {
    f"{module.__module__}.{module.__qualname__}": module for module in (WindowedTransformer, JoinWindows)
}
"""What modules.json calls them."""


def window_of(model: SentenceTransformer) -> int | None:
    """Tokens in a window of this model; None where texts are not split."""
    return getattr(model[0], "window", None)


def windows_in(model: SentenceTransformer, texts: list[str], prompt: str = "") -> list[int]:
    """Into how many windows each text goes; 1 each for a model without windows."""
    window = window_of(model)
    if window is None or not texts:
        return [1] * len(texts)
    frame, *lengths = count_tokens(model, ["", *texts], prompt)
    room = max(1, window - frame)
    return [max(1, math.ceil((min(n, model.max_seq_length or n) - frame) / room)) for n in lengths]


def longest_text(model: SentenceTransformer) -> int:
    """Tokens of the longest text that a model can be told to read whole."""
    limit = longest_input(model)
    return limit if window_of(model) is None else max(limit, LONGEST_TEXT)


def check_prompts(model: SentenceTransformer) -> None:
    """See that every prompt leaves room in a window, before the first long text is met in the middle of something.

    Raises:
        ConfigError: One does not.
    """
    window = window_of(model)
    if window is not None:
        for prompt in {model.prompts.get(task) or None for task in ("query", "document")}:
            model.preprocess(["a " * window], prompt=prompt)


def add_windows(model: SentenceTransformer, window: int) -> None:
    """Have a model read long texts in windows.

    `max_seq_length`, so many tokens of a text are read in all, is raised to `longest_text`.

    Args:
        model: A transformer and a pooling, perhaps with more after it; changed in place.
        window: Tokens in a window, special tokens and prompt included.

    Raises:
        ConfigError: The window is longer than the model's positions allow or shorter than `SHORTEST_WINDOW`, or the
            model is not built like that, or has windows of another length.
    """
    limit = longest_input(model)
    if not SHORTEST_WINDOW <= window <= limit:
        raise ConfigError(
            f"window={window}",
            f"{SHORTEST_WINDOW} to {limit} tokens, which is all that the base's positions allow",
            "None cuts texts instead.",
        )
    if window_of(model) is not None:
        raise ConfigError(
            f"window={window} for a model that was saved with windows of {window_of(model)}",
            "the windows that it has",
            "Leave window=None, or start from the base without windows.",
        )
    first: Any = model[0]
    at = next((i for i, module in enumerate(model) if isinstance(module, Pooling)), None)
    if type(first) is not Transformer or at is None or "message" in first.modalities:
        raise ConfigError(
            f"window={window} for a model of {', '.join(type(module).__name__ for module in model)}",
            "a text encoder: a Transformer and a Pooling, without a chat template",
            "Leave window=None.",
        )
    first.__class__ = WindowedTransformer  # the weights stay where they are
    first.split(window, max(limit, LONGEST_TEXT))
    named = list(model._modules.items())
    named.insert(at + 1, ("windows", JoinWindows(window)))
    if all(name.isdigit() for name, _ in named if name != "windows"):
        # as sentence-transformers numbers them; what a module is given by name moves with it
        kwargs = getattr(model, "module_kwargs", None)
        if kwargs:
            model.module_kwargs = {str(i): kwargs[name] for i, (name, _) in enumerate(named) if name in kwargs}
        named = [(str(i), module) for i, (_, module) in enumerate(named)]
    model._modules.clear()
    model._modules.update(named)
