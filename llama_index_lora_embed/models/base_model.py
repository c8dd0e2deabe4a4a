"""Base models: finding, hashing and loading them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError, ModelNotFoundError, UnsafeCheckpointError
from llama_index_lora_embed.core.files import file_digest
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.models.adapter_directory import CONFIG_NAME, PICKLES
from llama_index_lora_embed.models.pooling import append_end_token, choose_pooling, load_tokenizer, pooling_of
from llama_index_lora_embed.models.prompts import set_prompts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# folders of sentence-transformers repositories with exports, which this package does not load
_NOT_LOADED = ("onnx", "openvino")
_IGNORED_ON_HUB = [
    *(f"{folder}/*" for folder in _NOT_LOADED),
    *(f"*.{end}" for end in ("bin", "h5", "ot", "msgpack", "onnx", "pt", "ckpt", "gguf")),
]
_FIND = "Check the path or the id, and the network if it is on the Hub."


@dataclass(frozen=True)
class BaseInfo:
    """A base model that was found."""

    model_id: str
    """Hub id, or absolute path of a folder."""
    revision: str | None
    """Commit on the Hub; None for a folder."""
    path: Path
    weights_sha256: str
    """SHA-256 of its safetensors files."""

    def to_dict(self) -> dict[str, Any]:
        """The manifest's `base`."""
        return {"model_id": self.model_id, "revision": self.revision, "weights_sha256": self.weights_sha256}


def locate(model_id: str, revision: str | None = None, cache_folder: str | None = None) -> tuple[Path, str | None]:
    """Find a model on disk or on the Hub; files that are not in the cache are downloaded.

    Returns:
        (folder, commit); the commit is None for a local folder.

    Raises:
        ModelNotFoundError: There is neither such a folder nor such a repository within reach.
    """
    if (folder := check_local(model_id)) is not None:
        return folder, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(model_id, revision=revision, cache_dir=cache_folder, ignore_patterns=_IGNORED_ON_HUB)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"model {model_id!r}, which is not a folder and could not be loaded from the Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})",
            "a folder or a model id on the Hub",
            _FIND,
        ) from error
    return Path(found), Path(found).name


def check_local(model_id: str) -> Path | None:
    """The absolute path if a model id is a local folder; None if it can only be an id on the Hub.

    Raises:
        ModelNotFoundError: It is written as a path, but the folder does not exist.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder.absolute()
    written_as_path = folder.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1
    if written_as_path or folder.exists():
        kind = "a file" if folder.exists() else "not there"
        raise ModelNotFoundError(f"model {model_id!r}, which is {kind}", "a folder or a model id on the Hub", _FIND)
    return None


def describe_base(model_id: str, revision: str | None = None, cache_folder: str | None = None) -> BaseInfo:
    """Find a base model and hash its weights, without loading it.

    Raises:
        ModelNotFoundError: The model does not exist, or the folder contains no weights.
        UnsafeCheckpointError: The weights are only stored as a pickle.
        ConfigError: The model is an adapter.
    """
    path, commit = locate(model_id, revision, cache_folder)
    if (path / CONFIG_NAME).exists():
        raise ConfigError(
            f"base model {model_id!r}, which is an adapter",
            "a base model",
            f"{CONFIG_NAME} names the adapter's base model; LoraEmbedding({model_id!r}) loads both.",
        )
    weights = [p for p in sorted(path.rglob("*.safetensors")) if not set(_NOT_LOADED) & set(p.relative_to(path).parts)]
    if not weights:
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        if pickles or commit is not None:
            raise UnsafeCheckpointError(
                f"model {model_id!r} with weights in {', '.join(pickles) or 'no safetensors file'}",
                "model.safetensors: a pickle can run code when it is loaded",
                "If you trust it, convert it: SentenceTransformer(path).save_pretrained(new_path).",
            )
        raise ModelNotFoundError(
            f"folder {str(path)!r} without model weights", "a folder with model.safetensors", "Check the path."
        )
    stats = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in weights)
    name = model_id if commit is not None else str(path)
    return BaseInfo(name, commit, path, _weights_digest(stats, str(path)))


@lru_cache(maxsize=32)
def _weights_digest(stats: tuple[tuple[str, int, int], ...], root: str) -> str:
    """SHA-256 of one file, or of the names and digests of several; cached by size and modification time."""
    digests = [(os.path.relpath(path, root), file_digest(Path(path))) for path, _, _ in stats]
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def load_sentence_transformer(
    path: str, device: str | None, trust_remote_code: bool, **model_kwargs: Any
) -> SentenceTransformer:
    """Load a folder in float32, with this package's own modules (windows) and without pickles."""
    import torch
    from sentence_transformers import SentenceTransformer

    from llama_index_lora_embed.models.windows import MODULES

    # this package's own modules need no trust_remote_code
    return SentenceTransformer._load_with_module_classes(
        path,
        MODULES,
        device=device,
        trust_remote_code=trust_remote_code,
        # transformers 5 would use the stored precision; LoRA weights and merging need float32
        model_kwargs={"dtype": torch.float32, "use_safetensors": True, **model_kwargs},
    )


def load_base(
    base: BaseInfo,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    pooling: str | None = None,
    window: int | None = None,
    truncate_dim: int | None = None,
    quantized: bool = False,
    tokenizer_folder: Path | None = None,
) -> SentenceTransformer:
    """Load a base model in float32, with its prompts in `model.prompts["query"]` and `["document"]`.

    The arguments are those of `LoraEmbedding`. `quantized` stores the linear layers in 4 bits (NF4 with double
    quantisation; Dettmers et al., 2023, QLoRA, section 3) and computes in bfloat16, which needs a CUDA device.
    `tokenizer_folder` holds another tokenizer than the model's own.

    Raises:
        ModelNotFoundError: transformers cannot load the folder.
        ConfigError: `pooling`, `window` or `truncate_dim` does not fit the model, or `quantized` lacks a CUDA device.
        MissingExtraError: bitsandbytes is not installed.
    """
    from safetensors import SafetensorError

    from llama_index_lora_embed.models.windows import add_windows, check_prompts, longest_text, window_of

    quantization = _four_bits(device) if quantized else {}
    try:
        model = load_sentence_transformer(str(base.path), device, trust_remote_code, **quantization)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelNotFoundError(
            f"model {base.model_id!r}, which does not load ({type(error).__name__}: {error})",
            "a sentence-transformers or transformers model",
            "Check that SentenceTransformer(model_id) loads it.",
        ) from error
    choose_pooling(model, base.path, base.model_id, pooling)
    if tokenizer_folder is None:
        append_end_token(model.tokenizer, base.path, pooling_of(model))
    else:
        length = model.max_seq_length
        model[0].processor = load_tokenizer(tokenizer_folder, pooling_of(model))
        model.max_seq_length = length
    set_truncation(model, truncate_dim)
    set_prompts(model, base.model_id, query_prompt, passage_prompt)
    if model.transformers_model is not None:
        # a plain RoBERTa would get all 514 rows of its position table as its length, and fail at the 513th token
        limit = longest_text(model)
        model.max_seq_length = min(model.max_seq_length or limit, limit)
    if window is not None and window != window_of(model):
        add_windows(model, window)
    check_prompts(model)
    return model


def set_truncation(model: SentenceTransformer, truncate_dim: int | None) -> None:
    """Truncate a model's vectors to their first dimensions; None keeps the setting in its files.

    Raises:
        ConfigError: `truncate_dim` is not between 1 and the model's dimensions.
    """
    if truncate_dim is None:
        return
    with model.truncate_embeddings(None):
        whole = model.get_embedding_dimension()
    if not isinstance(truncate_dim, int) or isinstance(truncate_dim, bool) or not 1 <= truncate_dim <= (whole or 1):
        raise ConfigError(
            f"truncate_dim={truncate_dim!r}",
            f"a whole number from 1 to {whole}, the model's dimensions",
            "truncate_dim=None keeps all dimensions.",
        )
    model.truncate_dim = truncate_dim


def _four_bits(device: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base model in 4 bits."""
    import torch

    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f"quantized=True with device={device!r}, on a machine with {torch.cuda.device_count()} CUDA device(s)",
            "a CUDA device, on which bitsandbytes computes 4-bit layers",
            "Train without quantisation; precision='bf16' and a smaller batch_size reduce the memory too.",
        )
    require("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": settings, "device_map": {"": wanted}}
