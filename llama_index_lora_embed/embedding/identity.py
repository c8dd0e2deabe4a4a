"""Which embedding model a vector comes from: digests for queries and for passages."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

# fields of LlamaIndex's embedding classes that change their vectors
_SETTINGS = (
    *("model_name", "deployment_name", "dimensions"),
    *("query_instruction", "text_instruction", "max_length", "normalize"),
)


def passage_fingerprint(embed_model: BaseEmbedding) -> str:
    """The model's own `passage_fingerprint`; for models without one, a digest of their class and settings.

    Private state of a model and what is behind an API are not covered.
    """
    own = getattr(embed_model, "passage_fingerprint", None)
    return str(own) if own else _settings_digest(embed_model)


def query_fingerprint(embed_model: BaseEmbedding) -> str:
    """The model's own `fingerprint`; for models without one, the same digest as for passages."""
    own = getattr(embed_model, "fingerprint", None)
    return str(own) if own else _settings_digest(embed_model)


def fingerprint_with(embed_model: BaseEmbedding, adapter_digest: str) -> str:
    """The fingerprint of the model with an adapter on top of its query vectors; "" is one that changes nothing."""
    below = query_fingerprint(embed_model)
    return hashlib.sha256(f"{below}|{adapter_digest}".encode()).hexdigest() if adapter_digest else below


def _settings_digest(embed_model: BaseEmbedding) -> str:
    settings = {name: getattr(embed_model, name, None) for name in _SETTINGS}
    kind = type(embed_model)
    text = json.dumps([kind.__module__, kind.__qualname__, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
