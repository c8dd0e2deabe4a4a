"""Fine-tune open embedding models on your own LlamaIndex nodes with LoRA.

Importing this package imports no torch; each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index_lora_embed.data import (
        EmbeddingQAFinetuneDataset,
        FirstOf,
        InverseClozeMaker,
        Question,
        QuestionMaker,
        TitleMaker,
        split_by_source,
    )
    from llama_index_lora_embed.embedding import LoraEmbedding
    from llama_index_lora_embed.engine import LoraFinetuneEngine
    from llama_index_lora_embed.errors import LoraEmbedError
    from llama_index_lora_embed.evaluation import Verdict, evaluate_retrieval
    from llama_index_lora_embed.result import FinetuneResult

__version__ = "0.1.0"

_HOME = {
    "EmbeddingQAFinetuneDataset": "data",
    "FinetuneResult": "result",
    "FirstOf": "data",
    "InverseClozeMaker": "data",
    "LoraEmbedError": "errors",
    "LoraEmbedding": "embedding",
    "LoraFinetuneEngine": "engine",
    "Question": "data",
    "QuestionMaker": "data",
    "TitleMaker": "data",
    "Verdict": "evaluation",
    "evaluate_retrieval": "evaluation",
    "split_by_source": "data",
}

__all__ = [
    "EmbeddingQAFinetuneDataset",
    "FinetuneResult",
    "FirstOf",
    "InverseClozeMaker",
    "LoraEmbedError",
    "LoraEmbedding",
    "LoraFinetuneEngine",
    "Question",
    "QuestionMaker",
    "TitleMaker",
    "Verdict",
    "evaluate_retrieval",
    "split_by_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
