"""Fine-tune open embedding models on your own LlamaIndex nodes with LoRA.

Importing this package imports no torch; each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index_lora_embed.config import AskingSettings, FilterSettings, MiningSettings, ObjectiveSettings
    from llama_index_lora_embed.data import (
        EmbeddingQAFinetuneDataset,
        FirstOf,
        InverseClozeMaker,
        LabelledPairs,
        LLMQuestionMaker,
        Question,
        QuestionMaker,
        TitleMaker,
        generate_qa_embedding_pairs,
        mine_hard_negatives,
        split_by_source,
    )
    from llama_index_lora_embed.embedding import LoraEmbedding
    from llama_index_lora_embed.engine import LoraFinetuneEngine
    from llama_index_lora_embed.errors import LoraEmbedError
    from llama_index_lora_embed.evaluation import (
        RunRegistry,
        Verdict,
        compare_retrieval,
        evaluate_index,
        evaluate_pairs,
        evaluate_retrieval,
        tune_scale,
        write_report,
    )
    from llama_index_lora_embed.hub import push_to_hub
    from llama_index_lora_embed.index import Stamp, check, read_stamp, stamp
    from llama_index_lora_embed.index_versions import ChromaPlace, go_back, open_index, reindex
    from llama_index_lora_embed.result import FinetuneResult

__version__ = "0.1.0"

_HOME = {
    "AskingSettings": "config",
    "ChromaPlace": "index_versions",
    "EmbeddingQAFinetuneDataset": "data",
    "FilterSettings": "config",
    "FinetuneResult": "result",
    "FirstOf": "data",
    "InverseClozeMaker": "data",
    "LLMQuestionMaker": "data",
    "LabelledPairs": "data",
    "LoraEmbedError": "errors",
    "LoraEmbedding": "embedding",
    "LoraFinetuneEngine": "engine",
    "MiningSettings": "config",
    "ObjectiveSettings": "config",
    "Question": "data",
    "QuestionMaker": "data",
    "RunRegistry": "evaluation",
    "Stamp": "index",
    "TitleMaker": "data",
    "Verdict": "evaluation",
    "check": "index",
    "compare_retrieval": "evaluation",
    "evaluate_index": "evaluation",
    "evaluate_pairs": "evaluation",
    "evaluate_retrieval": "evaluation",
    "generate_qa_embedding_pairs": "data",
    "go_back": "index_versions",
    "mine_hard_negatives": "data",
    "open_index": "index_versions",
    "push_to_hub": "hub",
    "read_stamp": "index",
    "reindex": "index_versions",
    "split_by_source": "data",
    "stamp": "index",
    "tune_scale": "evaluation",
    "write_report": "evaluation",
}

__all__ = [
    "AskingSettings",
    "ChromaPlace",
    "EmbeddingQAFinetuneDataset",
    "FilterSettings",
    "FinetuneResult",
    "FirstOf",
    "InverseClozeMaker",
    "LLMQuestionMaker",
    "LabelledPairs",
    "LoraEmbedError",
    "LoraEmbedding",
    "LoraFinetuneEngine",
    "MiningSettings",
    "ObjectiveSettings",
    "Question",
    "QuestionMaker",
    "RunRegistry",
    "Stamp",
    "TitleMaker",
    "Verdict",
    "check",
    "compare_retrieval",
    "evaluate_index",
    "evaluate_pairs",
    "evaluate_retrieval",
    "generate_qa_embedding_pairs",
    "go_back",
    "mine_hard_negatives",
    "open_index",
    "push_to_hub",
    "read_stamp",
    "reindex",
    "split_by_source",
    "stamp",
    "tune_scale",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
