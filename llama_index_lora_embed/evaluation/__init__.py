"""Is it better now? Measures, and a comparison with a verdict. Knows LlamaIndex's BaseEmbedding, not training."""

from llama_index_lora_embed.evaluation.compare import Comparison, Verdict, compare, compare_pairs
from llama_index_lora_embed.evaluation.measures import measure
from llama_index_lora_embed.evaluation.pairs import PairEvaluation, evaluate_pair_encoders, evaluate_pairs
from llama_index_lora_embed.evaluation.registry import RunRegistry
from llama_index_lora_embed.evaluation.report import write_report
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, aevaluate_retrieval, evaluate_retrieval
from llama_index_lora_embed.evaluation.retrieval_comparison import (
    Canary,
    Difference,
    QueryOutcome,
    RetrievalComparison,
    SliceOutcome,
    compare_retrieval,
)
from llama_index_lora_embed.evaluation.retrievers import evaluate_index
from llama_index_lora_embed.evaluation.run_facts import RunFacts
from llama_index_lora_embed.evaluation.scale import ScaleSweep, tune_scale
from llama_index_lora_embed.evaluation.tables import (
    Table,
    comparison_tables,
    measures_table,
    print_comparison,
    to_markdown,
)
from llama_index_lora_embed.evaluation.versions import Gate, Version, VersionComparison

__all__ = [
    "Canary",
    "Comparison",
    "Difference",
    "Gate",
    "PairEvaluation",
    "QueryOutcome",
    "RetrievalComparison",
    "RetrievalEvaluation",
    "RunFacts",
    "RunRegistry",
    "ScaleSweep",
    "SliceOutcome",
    "Table",
    "Verdict",
    "Version",
    "VersionComparison",
    "aevaluate_retrieval",
    "compare",
    "compare_pairs",
    "compare_retrieval",
    "comparison_tables",
    "evaluate_index",
    "evaluate_pair_encoders",
    "evaluate_pairs",
    "evaluate_retrieval",
    "measure",
    "measures_table",
    "print_comparison",
    "to_markdown",
    "tune_scale",
    "write_report",
]
