"""Cross-encoders: what tells them from embedding models, and how they are loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError, ModelNotFoundError
from llama_index_lora_embed.models.base_model import BaseInfo

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

EXPECTED = "a cross-encoder with one score, such as cross-encoder/ms-marco-MiniLM-L6-v2"
_HINT = "Pass the folder or the id of a cross-encoder as teacher=."


def check_cross_encoder(folder: Path, name: str) -> None:
    """Check by its files that a model is a cross-encoder with one score; imports no torch.

    sentence-transformers would put a head of random weights on any other model.

    Raises:
        ConfigError: It is an embedding model, a language model, or a classifier of several classes.
    """
    config, of_library = (_read(folder / file) for file in ("config.json", "config_sentence_transformers.json"))
    kinds = [str(kind) for kind in config.get("architectures") or []]
    if of_library.get("model_type") == "CrossEncoder":
        classifier = any("SequenceClassification" in kind for kind in kinds)
    elif (folder / "modules.json").exists():
        raise ConfigError(f"teacher={name!r}, which is an embedding model ({', '.join(kinds)})", EXPECTED, _HINT)
    elif any("SequenceClassification" in kind for kind in kinds):
        classifier = True
    else:
        raise ConfigError(
            f"teacher={name!r}, which is a {', '.join(kinds) or 'folder without a model'}", EXPECTED, _HINT
        )
    # transformers writes the names of the classes unless there are two
    if classifier and (scores := len(config.get("id2label") or "12")) != 1:
        raise ConfigError(f"teacher={name!r} with {scores} scores", EXPECTED, _HINT)


def load_cross_encoder(base: BaseInfo, device: str, trust_remote_code: bool = False) -> CrossEncoder:
    """A checked cross-encoder in float32, without pickles.

    Raises:
        ModelNotFoundError: It does not load.
        ConfigError: It has several scores.
    """
    import torch
    from safetensors import SafetensorError
    from sentence_transformers import CrossEncoder

    try:
        model: CrossEncoder = CrossEncoder(
            str(base.path),
            device=device,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelNotFoundError(
            f"teacher={base.model_id!r}, which does not load ({type(error).__name__}: {error})", EXPECTED, _HINT
        ) from error
    if model.num_labels != 1:
        raise ConfigError(f"teacher={base.model_id!r} with {model.num_labels} scores", EXPECTED, _HINT)
    return model


def weights_digest(model: Any) -> str:
    """SHA-256 (hex) of a loaded model's weights and of its longest text."""
    import torch

    digest = hashlib.sha256(str(model.max_seq_length).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return values
