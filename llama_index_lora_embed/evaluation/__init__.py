"""Is the tuned model better? Metrics of embedding models and retrievers, and comparisons with a verdict."""

from llama_index_lora_embed.evaluation.adapter_scale import ScaleSweep as ScaleSweep
from llama_index_lora_embed.evaluation.adapter_scale import tune_scale as tune_scale
from llama_index_lora_embed.evaluation.compare import compare as compare
from llama_index_lora_embed.evaluation.judging.grades import Agreement as Agreement
from llama_index_lora_embed.evaluation.judging.judge import judge_queries as judge_queries
from llama_index_lora_embed.evaluation.judging.label import label_queries as label_queries
from llama_index_lora_embed.evaluation.judging.result import JudgedQueries as JudgedQueries
from llama_index_lora_embed.evaluation.judging.result import JudgingReport as JudgingReport
from llama_index_lora_embed.evaluation.metrics import compute_metrics as compute_metrics
from llama_index_lora_embed.evaluation.pair_comparison import compare_pairs as compare_pairs
from llama_index_lora_embed.evaluation.pairs import PairEvaluation as PairEvaluation
from llama_index_lora_embed.evaluation.pairs import evaluate_pairs as evaluate_pairs
from llama_index_lora_embed.evaluation.report.html import write_report as write_report
from llama_index_lora_embed.evaluation.report.run_facts import RunFacts as RunFacts
from llama_index_lora_embed.evaluation.report.tables import Table as Table
from llama_index_lora_embed.evaluation.report.tables import metrics_table as metrics_table
from llama_index_lora_embed.evaluation.report.tables import print_comparison as print_comparison
from llama_index_lora_embed.evaluation.report.tables import to_markdown as to_markdown
from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation as RetrievalEvaluation
from llama_index_lora_embed.evaluation.retrieval import aevaluate_retrieval as aevaluate_retrieval
from llama_index_lora_embed.evaluation.retrieval import evaluate_retrieval as evaluate_retrieval
from llama_index_lora_embed.evaluation.retrieval_comparison import RetrievalComparison as RetrievalComparison
from llama_index_lora_embed.evaluation.retrieval_comparison import compare_retrieval as compare_retrieval
from llama_index_lora_embed.evaluation.retriever import evaluate_index as evaluate_index
from llama_index_lora_embed.evaluation.verdict import Comparison as Comparison
from llama_index_lora_embed.evaluation.verdict import Verdict as Verdict
