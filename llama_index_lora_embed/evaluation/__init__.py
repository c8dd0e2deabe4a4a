"""Is it better now? Measures, and a comparison with a verdict. Knows LlamaIndex's BaseEmbedding, not training."""

from llama_index_lora_embed.evaluation.compare import Comparison, Verdict, compare, compare_pairs
from llama_index_lora_embed.evaluation.pairs import PairEvaluation, evaluate_pair_encoders, evaluate_pairs
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval
from llama_index_lora_embed.evaluation.scale import ScaleSweep, tune_scale

__all__ = [
    "Comparison",
    "PairEvaluation",
    "RetrievalEvaluation",
    "ScaleSweep",
    "Verdict",
    "compare",
    "compare_pairs",
    "evaluate_pair_encoders",
    "evaluate_pairs",
    "evaluate_retrieval",
    "tune_scale",
]
