"""Is it better now? Measures, and a comparison with a verdict. Knows LlamaIndex's BaseEmbedding, not training."""

from llama_index_lora_embed.evaluation.adapter_scale import ScaleSweep, tune_scale
from llama_index_lora_embed.evaluation.compare import Comparison, Verdict, compare, compare_pairs
from llama_index_lora_embed.evaluation.metrics import measure
from llama_index_lora_embed.evaluation.pairs import PairEvaluation, evaluate_pair_encoders, evaluate_pairs
from llama_index_lora_embed.evaluation.report.html import write_report
from llama_index_lora_embed.evaluation.report.run_facts import RunFacts
from llama_index_lora_embed.evaluation.report.tables import (
    Table,
    comparison_tables,
    metrics_table,
    print_comparison,
    to_markdown,
)
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, aevaluate_retrieval, evaluate_retrieval
from llama_index_lora_embed.evaluation.retrieval_comparison import (
    Difference,
    QueryOutcome,
    RegressionCheck,
    RetrievalComparison,
    SliceOutcome,
    compare_retrieval,
)
from llama_index_lora_embed.evaluation.retriever import evaluate_index

__all__ = [
    "Comparison",
    "Difference",
    "PairEvaluation",
    "QueryOutcome",
    "RegressionCheck",
    "RetrievalComparison",
    "RetrievalEvaluation",
    "RunFacts",
    "ScaleSweep",
    "SliceOutcome",
    "Table",
    "Verdict",
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
    "metrics_table",
    "print_comparison",
    "to_markdown",
    "tune_scale",
    "write_report",
]
