"""Nodes to dataset: question makers, filters, hard negatives, the dataset and its file, the split.

Importing it imports no torch.
"""

from llama_index_lora_embed.data.build import BuildReport, dataset_from_nodes
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.filters import FilterReport, filter_questions
from llama_index_lora_embed.data.generate import agenerate_qa_embedding_pairs, generate_qa_embedding_pairs
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.data.llm_questions import LLMQuestionMaker, judge_questions
from llama_index_lora_embed.data.makers import CarriedQuestionsMaker, InverseClozeMaker, NeighbourMaker, TitleMaker
from llama_index_lora_embed.data.negatives import MiningReport, mine_hard_negatives
from llama_index_lora_embed.data.pairs import PairsMaker, dataset_from_pairs
from llama_index_lora_embed.data.questions import FirstOf, NodeQuestionMaker, Question, QuestionMaker
from llama_index_lora_embed.data.split import SplitReport, split_by_source, split_report

__all__ = [
    "BuildReport",
    "CarriedQuestionsMaker",
    "EmbeddingQAFinetuneDataset",
    "FilterReport",
    "FirstOf",
    "InverseClozeMaker",
    "LLMQuestionMaker",
    "LabelledPairs",
    "MiningReport",
    "NeighbourMaker",
    "NodeQuestionMaker",
    "PairsMaker",
    "Question",
    "QuestionMaker",
    "SplitReport",
    "TitleMaker",
    "agenerate_qa_embedding_pairs",
    "dataset_from_nodes",
    "dataset_from_pairs",
    "filter_questions",
    "generate_qa_embedding_pairs",
    "judge_questions",
    "mine_hard_negatives",
    "split_by_source",
    "split_report",
]
