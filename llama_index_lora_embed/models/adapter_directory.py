"""The adapter directory: what is in it, how it is written, how it is read back and checked.

The directory is one that `SentenceTransformer(path)` loads, plus the manifest `finetune.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.config import MANIFEST_NAME
from llama_index_lora_embed.core.errors import AdapterError, OutputDirectoryError, UnsafeCheckpointError
from llama_index_lora_embed.core.files import file_digest, replace_directory, staging_beside
from llama_index_lora_embed.models.model_card import model_card

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
SCHEMA_VERSION = 1
_UNHASHED = {MANIFEST_NAME, "README.md"}  # a user may edit the README
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Manifest:
    """`finetune.json`: how an adapter was made and what decides its vectors.

    Attributes:
        fingerprint: Digest of all that decides the vectors; see `fingerprint`.
        base: Model id, revision (None for a folder) and SHA-256 of the base's weight files.
        files: SHA-256 of every other file of the directory but the README.
        prompts: Query and passage prompt.
        pooling: The modules after the transformer, each with its settings.
        max_seq_length: Tokens per text when embedding.
        normalise: Whether vectors have length 1.
        similarity: Name of the similarity function.
        lora: Rank, alpha and target modules.
        parent: Path and fingerprint of the adapter that was trained further; None if training started from the base.
        dataset: Digest and size of the training set, and how its questions were made.
        settings: `TrainingSettings` of the run.
        metrics: Measures of "base" and "tuned" on the validation set, if there was one.
        verdict: The comparison's sentence.
        best_step: Step of the kept weights; 0 is the untrained base.
        truncation: Share of texts cut, before and after the length was chosen.
        versions: Of the libraries.
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
    parent: dict[str, Any] | None = None
    dataset: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    verdict: str = ""
    best_step: int | None = None
    truncation: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The directory's manifest; None if it has none (a plain sentence-transformers adapter).

        Raises:
            AdapterError: It is damaged, or of a newer version of this package.
        """
        path = directory / MANIFEST_NAME
        if not path.exists():
            return None
        hint = "Restore the directory from a copy or train again."
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data["schema_version"]
            known = {f.name for f in fields(cls)}
            if version == SCHEMA_VERSION:
                return cls(**{key: value for key, value in data.items() if key in known})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"an unreadable {path} ({error})", "the manifest as it was written", hint) from error
        raise AdapterError(
            f"{path} of schema version {version!r}",
            f"version {SCHEMA_VERSION}",
            "Update llama-index-lora-embed.",
        )


def fingerprint(
    model: SentenceTransformer,
    base_sha256: str,
    directory: Path | None,
    precision: str = "float32",
    scale: float = 1.0,
) -> str:
    """Digest of all that decides a model's vectors.

    It covers the base's weights, the adapter's weights and scale, the tokenizer, prompts, pooling and the other
    modules after the transformer, `max_seq_length`, `truncate_dim` and precision; not where the files lie.

    Args:
        model: The loaded model, for its prompts, modules and length.
        base_sha256: Digest of the base's weight files.
        directory: Adapter directory; None for a base alone.
        precision: In which the vectors are computed.
        scale: What the adapter is multiplied by.

    Returns:
        64 hexadecimal digits.
    """
    adapter: dict[str, Any] = {}
    if directory is not None:
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        placing = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
        adapter = {key: value for key, value in config.items() if key not in placing}
        targets = adapter.get("target_modules")
        adapter["target_modules"] = targets if isinstance(targets, str) else sorted(targets or [])
        adapter["weights"] = file_digest(directory / WEIGHTS_NAME)
    decides: dict[str, Any] = {
        "base": base_sha256,
        "adapter": adapter,
        "prompts": {name: model.prompts.get(name, "") for name in ("query", "document")},
        "modules": describe_modules(model),
        "max_seq_length": model.max_seq_length,
        "tokenizer": _tokenizer_digest(model.tokenizer),
        "precision": precision,
    }
    # absent unless they say something, so that vectors that they do not change keep their fingerprint
    if scale != 1:
        decides["scale"] = float(scale)
    if model.truncate_dim is not None:
        decides["truncate_dim"] = model.truncate_dim
    if "message" in getattr(model[0], "modalities", ()):
        decides["chat_template"] = model.tokenizer.chat_template
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of vocabulary, merges, normalisation and special tokens; truncation and padding change from call to call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    rules.pop("truncation", None)
    rules.pop("padding", None)
    text = json.dumps([rules, tokenizer.padding_side], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_modules(model: SentenceTransformer) -> list[dict[str, Any]]:
    """The modules after the transformer, by class and settings: pooling, dense heads, normalisation."""
    described = []
    for module in list(model)[1:]:
        get_config = getattr(module, "get_config_dict", dict)
        described.append({"type": type(module).__name__, **get_config()})
    return described


def normalises(model: SentenceTransformer) -> bool:
    """Whether the model's own modules scale vectors to length 1."""
    return any(type(module).__name__ == "Normalize" for module in model)


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path, if an adapter can be written there without destroying anything but an adapter.

    An adapter that this package wrote there before is replaced when the new one is complete, and kept beside
    it as `<name>.previous`.

    Returns:
        The absolute path.

    Raises:
        OutputDirectoryError: It is a file, holds other files, or its folder cannot be written.
    """
    target = Path(path).expanduser().resolve()  # a link's target is replaced, not the link
    hint = "Choose another model_output_path."
    if target.exists() and not target.is_dir():
        raise OutputDirectoryError(f"model_output_path {str(target)!r}, which is a file", "a directory", hint)
    if target.is_dir() and not (target / MANIFEST_NAME).exists() and any(target.iterdir()):
        raise OutputDirectoryError(
            f"model_output_path {str(target)!r}, which holds files that this package did not write",
            "a new or empty directory, or one with an adapter to replace",
            hint,
        )
    if os.path.ismount(target):
        raise OutputDirectoryError(
            f"model_output_path {str(target)!r}, which is a mount point and cannot be replaced as a whole",
            "a directory",
            f"Write to one inside it, e.g. {str(target / 'adapter')!r}.",
        )
    previous = target.with_name(target.name + ".previous")
    if previous.exists() and not (previous / MANIFEST_NAME).exists() and target.is_dir() and any(target.iterdir()):
        raise OutputDirectoryError(
            f"{str(previous)!r}, where the adapter of now would be kept and which is something else",
            "that place free, or an earlier adapter in it",
            f"Move it, or choose another model_output_path than {target.name!r}.",
        )
    parent = next(folder for folder in target.parents if folder.exists())
    try:
        # the only test that counts: permissions, mounts and quotas all show here
        with tempfile.TemporaryDirectory(dir=parent, prefix=".writable-"):
            writable = not target.exists() or os.access(target, os.W_OK)
    except OSError as error:
        raise OutputDirectoryError(
            f"the folder {str(parent)!r}, where nothing can be written ({error})",
            "a folder that you may write to",
            hint,
        ) from error
    if not writable:
        raise OutputDirectoryError(f"model_output_path {str(target)!r}, which is read-only", "a writable one", hint)
    return target


def write_adapter(model: SentenceTransformer, target: Path, manifest: Manifest, base_sha256: str) -> Manifest:
    """Write the adapter directory: completely, or not at all.

    Everything is written into a folder beside the target, synced to disk, and moved into place.

    Args:
        model: Model with one adapter, added by `model.add_adapter`.
        target: Path that `check_output` has passed.
        manifest: Its `fingerprint` and `files` are filled in here.
        base_sha256: Digest of the base's weight files.

    Returns:
        The manifest as written.

    Raises:
        OutputDirectoryError: The disk is full or not writable; the target is as it was.
    """
    from safetensors import SafetensorError  # what a full disk raises in the largest file is no OSError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging_beside(target) as staging:
            model.save_pretrained(str(staging), create_model_card=False)
            _tidy_config(staging / CONFIG_NAME, manifest.base)
            rename_magnitudes(staging / WEIGHTS_NAME)
            (staging / "README.md").write_text(model_card(manifest), encoding="utf-8")
            written = Manifest(
                **{
                    **asdict(manifest),
                    "fingerprint": fingerprint(model, base_sha256, staging),
                    "files": digests(staging),
                }
            )
            (staging / MANIFEST_NAME).write_text(json.dumps(asdict(written), indent=2) + "\n", encoding="utf-8")
            replace_directory(staging, target)
    except (OSError, SafetensorError) as error:
        raise OutputDirectoryError(
            f"a failed write to {str(target)!r} ({error})",
            "room on a writable disk",
            "Free some space or choose another model_output_path; what was there before is unchanged.",
        ) from error
    return written


def check_files(directory: Path) -> Manifest | None:
    """Check an adapter directory before anything of it is loaded.

    Returns:
        Its manifest; None for an adapter that sentence-transformers saved.

    Raises:
        UnsafeCheckpointError: The weights are a pickle.
        AdapterError: A file is missing, cut short or changed.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise AdapterError(
            f"{str(directory)!r}, which has no {CONFIG_NAME}",
            "an adapter directory as finetune() or SentenceTransformer.save_pretrained writes it",
            "Check the path. A base model without an adapter is LoraEmbedding(base_model=...).",
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
        for name, digest in manifest.files.items():
            path = directory / name
            if not path.is_file() or file_digest(path) != digest:
                state = "changed or cut short" if path.is_file() else "missing"
                raise AdapterError(
                    f"{str(path)!r}, which is {state}",
                    f"the file as it was written (SHA-256 {digest[:12]}...)",
                    "Restore the directory from a copy, or train again.",
                )
    _check_safetensors(weights)
    return manifest


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{str(path)!r}, which is no whole safetensors file ({error})",
            "the file as it was written",
            "Restore the directory from a copy, or train again.",
        ) from error
    if not names:
        raise AdapterError(f"{str(path)!r} without any weights", "an adapter's weights", "Train again.")


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 (hex) of every file of an adapter directory but the manifest and the README, by its path in it."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in _UNHASHED)
    return {p.relative_to(directory).as_posix(): file_digest(p) for p in paths}


def rename_magnitudes(weights: Path) -> None:
    """Name DoRA's magnitudes in a weight file as transformers' loader finds them; other files stay as they are.

    peft writes "lora_magnitude_vector". transformers 5 looks for "lora_magnitude_vector.weight" and leaves a magnitude
    that it does not find at the base's, which only its log tells. peft's own loader takes either name.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    old = "lora_magnitude_vector"
    with safe_open(weights, framework="np") as file:
        if not any(name.endswith(old) for name in file.keys()):  # noqa: SIM118  # a safetensors file is no dict
            return
    tensors = {f"{name}.weight" if name.endswith(old) else name: t for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def _tidy_config(path: Path, base: dict[str, Any]) -> None:
    """Name the base as the user did, and make the file the same in every run."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(base_model_name_or_path=base["model_id"], revision=base["revision"], inference_mode=True)
    for name in ("target_modules", "exclude_modules"):  # sets, which come in any order
        if isinstance(config.get(name), list):
            config[name].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
