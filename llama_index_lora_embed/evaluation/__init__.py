"""Is it better now? Measures, and a comparison with a verdict. Knows LlamaIndex's BaseEmbedding, not training."""

from llama_index_lora_embed.evaluation.compare import Comparison, Verdict, compare
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation, evaluate_retrieval

__all__ = ["Comparison", "RetrievalEvaluation", "Verdict", "compare", "evaluate_retrieval"]
