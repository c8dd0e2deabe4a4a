"""Nodes to dataset: question makers, the dataset and its file, the split by source document.

Nothing here imports torch.
"""

from llama_index_lora_embed.data.build import BuildReport, dataset_from_nodes
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.questions import FirstOf, InverseClozeMaker, Question, QuestionMaker, TitleMaker
from llama_index_lora_embed.data.split import split_by_source

__all__ = [
    "BuildReport",
    "EmbeddingQAFinetuneDataset",
    "FirstOf",
    "InverseClozeMaker",
    "Question",
    "QuestionMaker",
    "TitleMaker",
    "dataset_from_nodes",
    "split_by_source",
]
