"""Facts about an LLM and its answers: identity, tokens, whether its calls block."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from typing import Any

from llama_index.core.llms import LLM
from llama_index.core.llms.custom import CustomLLM

# Fields of an LLM that decide its answers, by a part of their names. Counters, clients, keys and addresses do not.
_IDENTITY = re.compile(
    r"^model|temperature|^top_|^max_(?:new_|completion_|output_)?tokens|seed|system_prompt|query_wrapper_prompt|kwargs"
    r"|^stop|penalty|reasoning|thinking"
)
_PRIVATE = re.compile(r"key|header|auth|secret|password|timeout|retries", re.IGNORECASE)


def llm_identity(llm: LLM) -> str:
    """Digest of what decides the answers: class, model, temperature and the like, without keys and addresses."""
    fields = {name: _public(value) for name, value in llm.to_dict().items() if _IDENTITY.search(name)}
    text = json.dumps(
        {"class": llm.class_name(), "name": llm.metadata.model_name, **fields},
        sort_keys=True,
        default=lambda value: type(value).__name__,
    )
    return digest(text)


def _public(value: Any) -> Any:
    """Nested settings without the keys and headers that an LLM's `additional_kwargs` may hold."""
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items() if not _PRIVATE.search(str(name))}
    return value


def is_synchronous(llm: LLM) -> bool:
    """Whether its asynchronous methods are LlamaIndex's defaults, which block the event loop."""
    # LlamaIndex wraps methods at each access, so the wrapped functions are compared
    return isinstance(llm, CustomLLM) and inspect.unwrap(type(llm).acomplete) is inspect.unwrap(CustomLLM.acomplete)


def usage(response: Any) -> dict[str, int]:
    """Token counts from the fields of various providers; empty if the response has none."""
    found: dict[str, int] = {}
    raw = getattr(response, "raw", None)
    holders = [getattr(response, "additional_kwargs", None), raw]
    holders += [_field(raw, name) for name in ("usage", "usage_metadata", "token_usage")]
    for name, aliases in (
        ("prompt_tokens", ("prompt_tokens", "input_tokens", "prompt_token_count", "prompt_eval_count")),
        ("completion_tokens", ("completion_tokens", "output_tokens", "candidates_token_count", "eval_count")),
    ):
        values = [_field(holder, alias) for holder in holders for alias in aliases]
        number = next((v for v in values if isinstance(v, (int, float)) and math.isfinite(v) and v > 0), None)
        if number is not None:
            found[name] = int(number)
    return found


def _field(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def digest(text: str) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
