"""The adapter directory: its manifest, fingerprint, atomic writing and checks.

`SentenceTransformer(path)` loads it too: it is a saved sentence-transformers adapter plus the manifest `finetune.json`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.config import MANIFEST_NAME
from llama_index_lora_embed.core.errors import AdapterError, OutputDirectoryError, UnsafeCheckpointError
from llama_index_lora_embed.core.files import file_digest, replace_directory, staging_beside
from llama_index_lora_embed.models.model_card import model_card

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TASK_TYPE = "FEATURE_EXTRACTION"
"""Task type in adapter_config.json unless a `lora_config` names another; peft's auto classes need one."""
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
MAP_WEIGHTS_NAME = "embedding_adapter.safetensors"
"""Weights of an embedding adapter, which is a map on top of a model's vectors."""
OLD_CONFIG, OLD_WEIGHTS = "config.json", "pytorch_model.bin"
"""The files of llama-index-embeddings-adapter."""
SCHEMA_VERSION = 1
_UNHASHED = {MANIFEST_NAME, "README.md"}  # users may edit the README
_RESTORE = "Restore the directory from a copy, or train again."
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LIBRARIES = ("sentence-transformers", "transformers", "peft", "torch", "llama-index-core")


@dataclass(frozen=True)
class Manifest:
    """`finetune.json`: how an adapter was made and what determines its vectors.

    Attributes:
        fingerprint: Digest of everything that determines the vectors; see `fingerprint`.
        base: Model id, revision (None for a folder) and SHA-256 of the base model's weight files.
        files: SHA-256 of every other file in the directory except the README.
        pooling: The modules after the transformer, each with its settings.
        normalise: Whether vectors have length 1.
        lora: Rank, alpha, target modules and task type.
        tune: "both", or "query" for an adapter that only queries are embedded with.
        embedding_adapter: Of an embedding adapter: class and arguments of the map, and the embedding model that it was
            trained on; empty for a LoRA.
        parent: Path and fingerprint of the adapter that was continued; None if training started from the base model.
        parents: Path, fingerprint and weight of each adapter that was merged.
        dataset: Digest and size of the training set, and the origins of its queries.
        settings: `TrainingSettings` of the run.
        metrics: Metrics of "base" (as installed) and "tuned" on the validation set, if there was one; between them
            those of the base with the run's length, windows, prompts or pooling, if these matter there.
        base_change: The verdict on what lies between, in words.
        best_step: Step of the saved weights; 0 is the untrained base model.
        truncation: Share of truncated texts, before and after the length was chosen.
        created: UTC time, ISO 8601.
    """

    fingerprint: str
    base: dict[str, Any]
    prompts: dict[str, str]
    pooling: list[dict[str, Any]]
    max_seq_length: int
    normalise: bool
    similarity: str
    lora: dict[str, Any] = field(default_factory=dict)
    tune: str = "both"
    embedding_adapter: dict[str, Any] = field(default_factory=dict)
    parent: dict[str, Any] | None = None
    parents: list[dict[str, Any]] = field(default_factory=list)
    dataset: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    verdict: str = ""
    base_change: str = ""
    best_step: int | None = None
    truncation: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of(cls, model: SentenceTransformer, base: dict[str, Any], **origin: Any) -> Manifest:
        """The manifest of a model with an adapter named "default"; `write_adapter` adds fingerprint and files.

        Args:
            model: With the adapter's weights.
            base: `BaseInfo.to_dict` of its base model.
            **origin: The fields that say where the adapter comes from: parent, dataset, metrics, ...
        """
        lora: Any = model.transformers_model.peft_config["default"]  # type: ignore[union-attr]
        targets = lora.target_modules
        return cls(
            fingerprint="",
            base=base,
            prompts={name: model.prompts.get(name) or "" for name in ("query", "document")},
            pooling=describe_modules(model),
            max_seq_length=int(model.max_seq_length or 0),
            normalise=normalises(model),
            similarity=str(model.similarity_fn_name),
            lora={
                "r": lora.r,
                "lora_alpha": lora.lora_alpha,
                "target_modules": targets if isinstance(targets, str) else sorted(targets),
                "task_type": lora.task_type or TASK_TYPE,
            },
            **written_now(),
            **origin,
        )

    @property
    def trained_on(self) -> dict[str, int] | None:
        """Number of training queries by origin, which a verdict asks for; None where that is not recorded."""
        return self.dataset.get("origins")

    @property
    def window(self) -> int | None:
        """Tokens of the windows in which texts are read; None without windows."""
        return next((module["window"] for module in self.pooling if module["type"] == "JoinWindows"), None)

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The directory's manifest; None for a plain sentence-transformers adapter, which has none.

        Raises:
            AdapterError: The manifest is damaged, or was written by a newer version of this package.
        """
        path = directory / MANIFEST_NAME
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data["schema_version"]
            known = {f.name for f in fields(cls)}
            if version == SCHEMA_VERSION:
                return cls(**{key: value for key, value in data.items() if key in known})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"an unreadable {path} ({error})", "the original manifest", _RESTORE) from error
        raise AdapterError(
            f"{path} of schema version {version!r}", f"version {SCHEMA_VERSION}", "Update llama-index-lora-embed."
        )


def written_now() -> dict[str, Any]:
    """The fields of a manifest that say when and by which versions it was written."""
    from llama_index_lora_embed import __version__

    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"versions": {"llama-index-lora-embed": __version__, **versions}, "created": created}


def fingerprint(
    model: SentenceTransformer,
    base_sha256: str,
    directory: Path | None,
    scale: float = 1.0,
    prompts: Mapping[str, str | None] | None = None,
    tune: str = "both",
) -> str:
    """Digest of everything that determines a model's vectors.

    It covers the weights of the base model and of the adapter, the adapter's scale, the tokenizer, the prompts, the
    modules after the transformer, `max_seq_length` and `truncate_dim`, but no paths. `base_sha256` is the digest of the
    base model's weight files, `directory` the adapter directory; `prompts` replace the model's own; `tune` says which
    sides the adapter is used for.
    """
    adapter: dict[str, Any] = {}
    if directory is not None:
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        ignored = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
        adapter = {key: value for key, value in config.items() if key not in ignored}
        targets = adapter.get("target_modules")
        adapter["target_modules"] = targets if isinstance(targets, str) else sorted(targets or [])
        adapter["weights"] = file_digest(directory / WEIGHTS_NAME)
    prompts = prompts or model.prompts
    determining: dict[str, Any] = {
        "base": base_sha256,
        "adapter": adapter,
        "prompts": {name: prompts.get(name, "") for name in ("query", "document")},
        "modules": describe_modules(model),
        "max_seq_length": model.max_seq_length,
        "tokenizer": tokenizer_digest(model.tokenizer),
        "precision": "float32",
    }
    # left out at their defaults, so that the fingerprints of earlier versions stay valid
    if scale != 1:
        determining["scale"] = float(scale)
    if tune != "both":
        determining["tune"] = tune
    if model.truncate_dim is not None:
        determining["truncate_dim"] = model.truncate_dim
    if "message" in getattr(model[0], "modalities", ()):
        determining["chat_template"] = model.tokenizer.chat_template
    return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of vocabulary, merges, normalisation and special tokens; truncation and padding change with each call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    rules.pop("truncation", None)
    rules.pop("padding", None)
    text = json.dumps([rules, tokenizer.padding_side], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_modules(model: SentenceTransformer) -> list[dict[str, Any]]:
    """Class and settings of each module after the transformer: pooling, dense heads, normalisation."""
    return [{"type": type(module).__name__, **getattr(module, "get_config_dict", dict)()} for module in list(model)[1:]]


def normalises(model: SentenceTransformer) -> bool:
    """Whether the model has a Normalize module, which scales vectors to length 1."""
    return any(type(module).__name__ == "Normalize" for module in model)


def check_output(path: str | os.PathLike[str], replaces: Callable[[Path], bool] = lambda folder: False) -> Path:
    """Check that an adapter can be written to a path without overwriting anything but an adapter.

    An adapter that this package wrote there is replaced once the new one is complete, and kept as `<name>.previous`;
    so are other folders for which `replaces` is true. Returns the absolute path, links resolved.

    Raises:
        OutputDirectoryError: The path is a file, holds other files, or its folder is not writable.
    """

    def is_adapter(folder: Path) -> bool:
        return (folder / MANIFEST_NAME).exists() or replaces(folder)

    target = Path(path).expanduser().resolve()
    previous = target.with_name(target.name + ".previous")
    taken = target.is_dir() and any(target.iterdir())
    problem, hint = None, "Choose another model_output_path."
    if target.exists() and not target.is_dir():
        problem = "which is a file", "a directory"
    elif taken and not is_adapter(target):
        content, to_start_from = _foreign_content(target)
        problem = f"which contains {content}", "a new or empty directory, or one with an adapter to replace"
        if to_start_from:
            hint += f" Training starts from what is there with {to_start_from}={str(path)!r}."
    elif os.path.ismount(target):
        inside = str(target / "adapter")
        problem = "which is a mount point and cannot be moved", f"a directory inside it, e.g. {inside!r}"
    elif taken and previous.exists() and not is_adapter(previous):
        problem = (
            f"whose content would be moved to {str(previous)!r}, which is not an adapter",
            "a path whose '.previous' is free or an earlier adapter",
        )
    elif (reason := _not_writable(target)) is not None:
        problem = f"which is not writable ({reason})", "a writable folder"
    if problem is not None:
        got, expected = problem
        raise OutputDirectoryError(f"model_output_path {str(target)!r}, {got}", expected, hint)
    return target


def is_old_embedding_adapter(folder: Path) -> bool:
    """Whether a folder is one that llama-index-embeddings-adapter wrote, with nothing else in it."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} == {OLD_CONFIG, OLD_WEIGHTS}


def _foreign_content(folder: Path) -> tuple[str, str | None]:
    """What a folder without a manifest contains, and the argument by which training starts from it, if any does."""
    if (folder / CONFIG_NAME).exists():
        return "an adapter that sentence-transformers or peft wrote", "continue_from"
    if (folder / "modules.json").exists():
        return "a full model, written by llama-index-finetuning's engine or by sentence-transformers", "model_id"
    if (folder / "config.json").exists():
        return "a full model, written by transformers", "model_id"
    return "files that this package did not write", None


def _not_writable(target: Path) -> str | None:
    """Why a directory cannot be written; permissions, mounts and quotas all show in a trial write."""
    parent = next(folder for folder in target.parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".writable-"):
            return None if not target.exists() or os.access(target, os.W_OK) else "it is read-only"
    except OSError as error:
        return str(error)


@contextmanager
def written_directory(target: Path) -> Iterator[Path]:
    """A folder beside the target to write an adapter into; synced to disk and moved into place at the end.

    Raises:
        OutputDirectoryError: The disk is full or not writable; the target is unchanged.
    """
    from safetensors import SafetensorError  # raised on a full disk instead of an OSError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging_beside(target) as staging:
            yield staging
            replace_directory(staging, target)
    except (OSError, SafetensorError) as error:
        raise OutputDirectoryError(
            f"a failed write to {str(target)!r} ({error})",
            "free space on a writable disk",
            "Free some space or choose another model_output_path; the previous content is unchanged.",
        ) from error


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write `finetune.json`."""
    (directory / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def write_adapter(model: SentenceTransformer, target: Path, manifest: Manifest, base_sha256: str) -> Manifest:
    """Write the adapter directory atomically: into a folder beside the target, synced to disk and moved into place.

    Returns the manifest as written, with `fingerprint` and `files` filled in; `target` is from `check_output`.

    Raises:
        OutputDirectoryError: The disk is full or not writable; the target is unchanged.
    """
    with written_directory(target) as staging:
        model.save_pretrained(str(staging), create_model_card=False)
        _tidy_config(staging / CONFIG_NAME, manifest.base)
        rename_magnitudes(staging / WEIGHTS_NAME)
        (staging / "README.md").write_text(model_card(manifest), encoding="utf-8")
        digest = fingerprint(model, base_sha256, staging, tune=manifest.tune)
        written = replace(manifest, fingerprint=digest, files=digests(staging))
        write_manifest(written, staging)
    return written


def check_files(directory: Path) -> Manifest | None:
    """Check the files of an adapter directory before any of them is loaded, and return its manifest, if any.

    Raises:
        UnsafeCheckpointError: The weights are a pickle.
        AdapterError: A file is missing, cut short or changed.
    """
    if not (directory / CONFIG_NAME).is_file():
        if is_old_embedding_adapter(directory) or (directory / MAP_WEIGHTS_NAME).is_file():
            raise AdapterError(
                f"{str(directory)!r}, which holds an embedding adapter: a map on top of another model's vectors",
                "an adapter of a model's own layers (LoRA)",
                f"AdapterEmbeddingModel(embed_model, {str(directory)!r}), with the model that it was trained on.",
            )
        raise AdapterError(
            f"{str(directory)!r}, which has no {CONFIG_NAME}",
            "an adapter directory, written by finetune() or SentenceTransformer.save_pretrained()",
            "Check the path. LoraEmbedding(base_model=...) loads a base model without an adapter.",
        )
    weights = directory / WEIGHTS_NAME
    if not weights.is_file():
        if pickles := sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES):
            raise UnsafeCheckpointError(
                f"weights in {', '.join(pickles)} under {str(directory)!r}",
                f"{WEIGHTS_NAME}: a pickle can run code when it is loaded",
                "Save the adapter again with a current peft, which writes safetensors.",
            )
        raise AdapterError(f"{str(directory)!r} without {WEIGHTS_NAME}", "the adapter's weights", "Train again.")
    manifest = Manifest.read(directory)
    if manifest is not None:
        check_digests(directory, manifest.files, _RESTORE)
    _check_safetensors(weights)
    return manifest


def check_digests(directory: Path, files: Mapping[str, str], hint: str) -> None:
    """Compare files with their SHA-256.

    Raises:
        AdapterError: A file is missing or changed; its hint is `hint`.
    """
    for name, digest in files.items():
        path = directory / name
        if not path.is_file() or file_digest(path) != digest:
            state = "changed or cut short" if path.is_file() else "missing"
            raise AdapterError(
                f"{str(path)!r}, which is {state}", f"the original file (SHA-256 {digest[:12]}...)", hint
            )


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{str(path)!r}, which is not a complete safetensors file ({error})", "the original file", _RESTORE
        ) from error
    if not names:
        raise AdapterError(f"{str(path)!r} without any weights", "an adapter's weights", "Train again.")


def digests(directory: Path) -> dict[str, str]:
    """Relative path to SHA-256 (hex) of every file in an adapter directory except the manifest and the README."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in _UNHASHED)
    return {p.relative_to(directory).as_posix(): file_digest(p) for p in paths}


def rename_magnitudes(weights: Path) -> None:
    """Rename DoRA's magnitudes in a weight file to the names that transformers' loader expects.

    peft writes "lora_magnitude_vector". transformers 5 expects "lora_magnitude_vector.weight" and otherwise keeps the
    base model's magnitudes with no more than a log line. peft's own loader accepts either name.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    old = "lora_magnitude_vector"
    with safe_open(weights, framework="np") as file:
        if not any(name.endswith(old) for name in file.keys()):  # noqa: SIM118  # a safetensors file is not a dict
            return
    tensors = {f"{name}.weight" if name.endswith(old) else name: t for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def _tidy_config(path: Path, base: dict[str, Any]) -> None:
    """Record the base model's id and a task type, and make the file the same in every run."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["task_type"] = config.get("task_type") or TASK_TYPE
    config.update(base_model_name_or_path=base["model_id"], revision=base["revision"], inference_mode=True)
    for name in ("target_modules", "exclude_modules"):  # sets, whose order varies
        if isinstance(config.get(name), list):
            config[name].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
