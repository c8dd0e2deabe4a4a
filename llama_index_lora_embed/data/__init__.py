"""From nodes to a dataset: query generators, filters, splits, labelled pairs and their files; imports no torch."""

from llama_index_lora_embed.data.build import BuildReport, dataset_from_nodes
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.deduplicate import NearDuplicatesReport, drop_near_duplicates
from llama_index_lora_embed.data.filters.rules import QueryFilterReport, filter_queries
from llama_index_lora_embed.data.generate import agenerate_qa_embedding_pairs, generate_qa_embedding_pairs
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs
from llama_index_lora_embed.data.questions.base import FirstOf, GeneratedQuery, NodeQueryGenerator, QueryGenerator
from llama_index_lora_embed.data.questions.heuristic import (
    DefinitionQueryGenerator,
    InverseClozeQueryGenerator,
    LeadQueryGenerator,
    MetadataQueryGenerator,
    NeighbourQueryGenerator,
    TitleQueryGenerator,
)
from llama_index_lora_embed.data.questions.llm import LLMQueryGenerator, drop_unanswered_queries
from llama_index_lora_embed.data.questions.query_log import QueryLogGenerator, dataset_from_pairs
from llama_index_lora_embed.data.readers.vector_stores import read_vectors
from llama_index_lora_embed.data.split import SplitReport, split_by_source, split_report
from llama_index_lora_embed.data.stored_vectors import StoredVectors

__all__ = [
    "BuildReport",
    "DefinitionQueryGenerator",
    "EmbeddingQAFinetuneDataset",
    "FirstOf",
    "GeneratedQuery",
    "InverseClozeQueryGenerator",
    "LLMQueryGenerator",
    "LabelledPairs",
    "LeadQueryGenerator",
    "MetadataQueryGenerator",
    "NearDuplicatesReport",
    "NeighbourQueryGenerator",
    "NodeQueryGenerator",
    "QueryFilterReport",
    "QueryGenerator",
    "QueryLogGenerator",
    "SplitReport",
    "StoredVectors",
    "TitleQueryGenerator",
    "agenerate_qa_embedding_pairs",
    "dataset_from_nodes",
    "dataset_from_pairs",
    "drop_near_duplicates",
    "drop_unanswered_queries",
    "filter_queries",
    "generate_qa_embedding_pairs",
    "read_vectors",
    "split_by_source",
    "split_report",
]
