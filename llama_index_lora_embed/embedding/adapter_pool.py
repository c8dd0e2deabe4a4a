"""One base in memory with many adapters beside it: each text is embedded with the adapter that it names."""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np

from llama_index_lora_embed.core.errors import AdapterError, BaseModelMismatchError, ConfigError, LoraEmbedError
from llama_index_lora_embed.core.files import file_digest
from llama_index_lora_embed.embedding.encode import NO_ADAPTER, Task, Vectors, encode
from llama_index_lora_embed.models import base_model, lora_adapter
from llama_index_lora_embed.models.adapter_directory import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Manifest,
    check_files,
    describe_modules,
    fingerprint,
)
from llama_index_lora_embed.models.lora_adapter import beyond_lora, check_effect, check_keys, scale_lora
from llama_index_lora_embed.models.windows import check_prompts, longest_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_MIXED_TOLERANCE = 1e-4  # relative; padding changes sums in their last digits
_ROOM = 16  # tokens that a tokenizer adds to a text, and more


@dataclass(frozen=True)
class Adapter:
    """An adapter that a base can hold.

    Attributes:
        name: peft's name for it: of its weights, settings and scale, so that two users of a base can share it.
        path: Its directory.
        prompts: "query" and "document".
        max_seq_length: Tokens beyond which a text is cut.
        fingerprint: Of its vectors; the same as of `LoraEmbedding(path)`.
        manifest: None for an adapter that sentence-transformers saved.
        scale: What it is multiplied by.
    """

    name: str
    path: Path
    prompts: dict[str, str]
    max_seq_length: int
    fingerprint: str
    manifest: Manifest | None
    scale: float = 1.0


class AdapterPool:
    """A loaded base and the adapters that are in memory with it.

    Everybody in the process who asks for the same base gets the same object (`AdapterPool.of`); it is freed with the
    last of them. All methods can be called from several threads: they take turns.

    Args:
        base: What `models.describe_base` found.
        model: The base, loaded by `models.load_base`; nobody else may change it.
    """

    _all: ClassVar[WeakValueDictionary[tuple[Any, ...], AdapterPool]] = WeakValueDictionary()
    _making: ClassVar[Any] = threading.Lock()

    def __init__(self, base: base_model.BaseInfo, model: SentenceTransformer) -> None:
        self.base = base
        self.model = model
        self.prompts = {task: model.prompts.get(task) or "" for task in ("query", "document")}
        self.max_seq_length = int(model.max_seq_length or 0)
        self.lock = threading.RLock()
        self._resident: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._most = 1
        self._mixes: bool | None = None

    @classmethod
    def of(cls, base: base_model.BaseInfo, **loading: Any) -> AdapterPool:
        """The process's own of this base, loaded if it is not there.

        Args:
            base: What `models.describe_base` found.
            **loading: For `models.load_base`; who loads it in another way gets another.
        """
        key = (base.weights_sha256, str(base.path), *sorted(loading.items()))
        with cls._making:
            shared = cls._all.get(key)
            if shared is None:
                shared = cls._all[key] = cls(base, base_model.load_base(base, **loading))
            return shared

    def resident(self) -> list[str]:
        """Names that peft has for the adapters in memory, the least recently used first."""
        with self.lock:
            return list(self._resident)

    def fingerprint_of(
        self, prompts: dict[str, str], max_seq_length: int, directory: Path | None, scale: float = 1.0
    ) -> str:
        """`adapter.fingerprint` of the base, or of an adapter's directory, with these prompts and this length."""
        with self.lock, self._length(max_seq_length):
            before = dict(self.model.prompts)
            self.model.prompts.update(prompts)
            try:
                check_prompts(self.model)
                return fingerprint(self.model, self.base.weights_sha256, directory, scale=scale)
            finally:
                self.model.prompts.clear()
                self.model.prompts.update(before)

    def describe(
        self,
        path: str,
        *,
        cache_folder: str | None = None,
        prompts: dict[str, str] | None = None,
        scale: float = 1.0,
    ) -> Adapter:
        """Find an adapter and check that it fits; its weights are loaded when a text first names it.

        Args:
            path: Folder or Hub id.
            cache_folder: Of huggingface_hub.
            prompts: Instead of those recorded.
            scale: Multiply it by so much, from 0 to 1.

        Raises:
            ModelNotFoundError: It is not there.
            AdapterError: It is damaged, or does nothing.
            BaseModelMismatchError: It was trained on another base.
            ConfigError: It cannot be one of several: DoRA, whole modules, biases, or another pooling than the base's.
        """
        directory, _ = base_model.locate(path, None, cache_folder)
        manifest = check_files(directory)
        config = lora_adapter.read_config(directory / CONFIG_NAME)
        # an adapter of sentence-transformers says where its base is, not which weights it had
        place = str(self.base.path) if manifest is not None else None
        found = lora_adapter.find_base(place, config, manifest, cache_folder, directory)
        if found.weights_sha256 != self.base.weights_sha256:
            raise BaseModelMismatchError(
                f"the adapter {str(directory)!r}, trained on {found.model_id!r}",
                f"one for the loaded base, {self.base.model_id!r}",
                f"Load it alone: LoraEmbedding({str(directory)!r}).",
            )
        self._check_kind(directory, config, manifest)
        check_effect(directory, manifest)
        recorded = _read(directory / "config_sentence_transformers.json").get("prompts") or {}
        prompts = {**{task: recorded.get(task) or "" for task in self.prompts}, **(prompts or {})}
        limit = manifest.max_seq_length if manifest is not None else _length_of(directory) or self.max_seq_length
        limit = min(limit, longest_text(self.model))
        digest = self.fingerprint_of(prompts, limit, directory, scale)
        return Adapter(_name(directory, scale), directory, prompts, limit, digest, manifest, scale)

    def encode(
        self,
        texts: Sequence[str],
        adapters: Sequence[Adapter | None],
        task: Task,
        *,
        most_adapters: int,
        base_prompts: dict[str, str] | None = None,
        most_tokens: int | None = None,
        most_texts: int | None = None,
        unit_length: bool = False,
    ) -> Vectors:
        """Vectors of texts, each with its adapter, in as few forward passes as if there were one adapter.

        Args:
            texts: Checked.
            adapters: Of each text; None for the base.
            task: "query" or "document".
            most_adapters: To hold in memory, if nobody has asked for more; others are unloaded, the least recently used
                first. Where the texts name more, they are computed in several rounds.
            base_prompts: Of texts without an adapter, instead of the base's.
            most_tokens: In a forward pass.
            most_texts: In a forward pass.
            unit_length: Scale vectors to length 1.

        Returns:
            float32 [texts, dimension].

        Raises:
            AdapterError: An adapter's files have changed since `describe`, or do not fit.
        """
        by_name: dict[str, list[int]] = defaultdict(list)
        for number, adapter in enumerate(adapters):
            by_name[NO_ADAPTER if adapter is None else adapter.name].append(number)
        out: Vectors | None = None
        with self.lock:
            self._most = max(self._most, most_adapters)
            for names in self._rounds(by_name, adapters):
                numbers = [i for name in names for i in by_name[name]]
                self._hold({a.name: a for i in numbers if (a := adapters[i]) is not None})
                for (prompt, limit), members in self._alike(texts, adapters, numbers, task, base_prompts).items():
                    with self._length(limit):
                        vectors = encode(
                            self.model,
                            [texts[i] for i in members],
                            task,
                            prompt=prompt,
                            adapters=[NO_ADAPTER if (a := adapters[i]) is None else a.name for i in members],
                            most_tokens=most_tokens,
                            most_texts=most_texts,
                            unit_length=unit_length,
                        )
                    if out is None:
                        out = np.empty((len(texts), vectors.shape[1]), dtype=np.float32)
                    out[members] = vectors
        return encode(self.model, [], task) if out is None else out

    def _rounds(self, by_name: dict[str, list[int]], adapters: Sequence[Adapter | None]) -> list[list[str]]:
        """Names of adapters that are computed together."""
        names = list(by_name)
        if len(names) < 2 or self._can_mix(by_name, adapters):
            return [names[i : i + self._most] for i in range(0, len(names), self._most)]
        return [[name] for name in names]

    def _can_mix(self, by_name: dict[str, list[int]], adapters: Sequence[Adapter | None]) -> bool:
        """Whether the model's layers keep texts apart; tried once, with the first two adapters that meet.

        Some architectures put tokens before texts, or share rows among texts.
        """
        if self._mixes is None:
            some = [name for name in by_name if name != NO_ADAPTER][: max(1, min(2, self._most))]
            self._hold({n: a for n in some if (a := adapters[by_name[n][0]]) is not None})
            names = [*some, NO_ADAPTER]
            texts = ["which rows are of which text, in every layer?", "a text that is a little longer, another one",
                     "the base alone for this one, with no adapter"][: len(names)]  # fmt: skip
            try:
                mixed = encode(self.model, texts, "document", prompt="", adapters=names)
                alone = [
                    encode(self.model, [t], "document", prompt="", adapters=[n])
                    for t, n in zip(texts, names, strict=True)
                ]
                scale = float(np.abs(alone).max())
                self._mixes = bool(np.abs(mixed - np.concatenate(alone)).max() <= _MIXED_TOLERANCE * scale)
            except (ConfigError, ValueError, RuntimeError, TypeError, IndexError) as error:
                logger.info("adapters of %s are computed one after the other: %s", self.base.model_id, error)
                self._mixes = False
        return self._mixes

    def unload(self, adapter: Adapter) -> None:
        """Free an adapter's memory, once those who are using it have done so; it is loaded again when it is named."""
        with self.lock:
            if adapter.name in self._resident:
                self._drop(adapter.name)

    def _drop(self, name: str) -> None:
        self.model.delete_adapter(name)
        del self._resident[name]

    def _alike(
        self,
        texts: Sequence[str],
        adapters: Sequence[Adapter | None],
        numbers: list[int],
        task: Task,
        base_prompts: dict[str, str] | None,
    ) -> dict[tuple[str, int], list[int]]:
        """Numbers of texts that can share a forward pass, by prompt and length.

        A text that is too short to be cut goes with any length.
        """
        lengths = [self.max_seq_length if a is None else a.max_seq_length for a in (adapters[i] for i in numbers)]
        shortest = min(lengths, default=0)
        alike: dict[tuple[str, int], list[int]] = defaultdict(list)
        for number, length in zip(numbers, lengths, strict=True):
            adapter, text = adapters[number], texts[number]
            prompt = (adapter.prompts if adapter is not None else base_prompts or self.prompts)[task]
            # an ASCII character is one token at most
            whole = text.isascii() and prompt.isascii() and len(prompt) + len(text) + _ROOM <= shortest
            alike[prompt, shortest if whole else length].append(number)
        return alike

    @contextmanager
    def _length(self, limit: int) -> Iterator[None]:
        self.model.max_seq_length = limit
        try:
            yield
        finally:
            self.model.max_seq_length = self.max_seq_length

    def _hold(self, wanted: dict[str, Adapter]) -> None:
        """Have these in memory, and no more than so many others that the bound is kept."""
        for name in wanted:
            if name in self._resident:
                self._resident.move_to_end(name)
        for name in [name for name in self._resident if name not in wanted]:
            if len(self._resident.keys() | wanted.keys()) <= self._most:
                break
            self._drop(name)
        for name, adapter in wanted.items():
            if name not in self._resident:
                self._load(adapter)
                self._resident[name] = None

    def _load(self, adapter: Adapter) -> None:
        if not adapter.path.is_dir() or _name(adapter.path, adapter.scale) != adapter.name:
            raise _changed(adapter)
        try:
            with _quiet():
                self.model.load_adapter(str(adapter.path), adapter_name=adapter.name)
            check_keys(self.model, adapter.path, adapter.name)
            if _name(adapter.path, adapter.scale) != adapter.name:  # replaced while it was read
                raise _changed(adapter)
            scale_lora(self.model, adapter.scale, adapter.name)
        except BaseException as error:
            with suppress(Exception):
                self.model.delete_adapter(adapter.name)
            if isinstance(error, LoraEmbedError) or not isinstance(error, Exception):
                raise
            raise AdapterError(
                f"the adapter {str(adapter.path)!r}, which does not load onto {self.base.model_id!r} "
                f"({type(error).__name__}: {error})",
                "an adapter for this base model",
                "Train again, or load it alone: LoraEmbedding(path).",
            ) from error

    def _check_kind(self, directory: Path, config: dict[str, Any], manifest: Manifest | None) -> None:
        if more := beyond_lora(config):
            raise ConfigError(
                f"the adapter {str(directory)!r} with {', '.join(more)}",
                "plain LoRA: others cannot share a forward pass with each other",
                f"Load it alone: LoraEmbedding({str(directory)!r}).",
            )
        for path in directory.rglob("*.safetensors"):  # of heads, which sentence-transformers may have trained, too
            same = self.base.path / path.relative_to(directory)
            if path != directory / WEIGHTS_NAME and not (same.is_file() and file_digest(same) == file_digest(path)):
                raise ConfigError(
                    f"the adapter {str(directory)!r} with weights of its own in {path.relative_to(directory)}",
                    "an adapter whose other modules are the base's",
                    f"Load it alone: LoraEmbedding({str(directory)!r}).",
                )
        own = describe_modules(self.model)
        trained = manifest.pooling if manifest is not None else _modules_of(directory, own)
        if json.loads(json.dumps(own)) != trained:
            raise ConfigError(
                f"the adapter {str(directory)!r}, trained with the modules {trained}",
                f"those of the loaded base, {own}",
                "Pass the pooling= or window= that it was trained with, or load it alone: LoraEmbedding(path).",
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report that a file lacks the other adapters' weights; `check_keys` looks itself."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _changed(adapter: Adapter) -> AdapterError:
    return AdapterError(
        f"{str(adapter.path)!r}, which is not what it was when it was added",
        "the adapter with the fingerprint " + adapter.fingerprint[:12] + "...",
        "Add it again under its name, and index with it again.",
    )


def _name(directory: Path, scale: float) -> str:
    """The name for peft: it must hold no dots, and say nothing of where the files lie."""
    parts = [file_digest(directory / name) for name in (WEIGHTS_NAME, CONFIG_NAME)]
    digits = "" if scale == 1 else f"_{float(scale).hex().replace('.', 'd')}"
    return "adapter_" + "_".join(part[:16] for part in parts) + digits


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _length_of(directory: Path) -> int | None:
    """`max_seq_length` of an adapter of sentence-transformers."""
    for file, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        if isinstance(limit := _read(directory / file).get(key), int):
            return limit
    return None


def _modules_of(directory: Path, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Modules after the transformer of an adapter of sentence-transformers, as `describe_modules` has them."""
    try:
        listed = json.loads((directory / "modules.json").read_text(encoding="utf-8"))[1:]
    except (OSError, ValueError):
        return own  # an adapter of peft alone has no modules of its own
    return [
        {"type": module["type"].rpartition(".")[2], **_read(directory / module["path"] / "config.json")}
        for module in listed
    ]
