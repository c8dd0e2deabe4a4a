"""llama-index-finetuning's `generate_qa_embedding_pairs`, on top of `LLMQueryGenerator` and its journal."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llama_index.core.llms import LLM
from llama_index.core.schema import BaseNode, MetadataMode
from tqdm.auto import tqdm

from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.build import check_arguments, dataset_from_nodes
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.origins import LLM_WRITTEN
from llama_index_lora_embed.data.questions.base import GeneratedQuery, embed_text
from llama_index_lora_embed.data.questions.llm import LLMQueryGenerator
from llama_index_lora_embed.data.questions.prompts import STYLES, search_prompt

logger = logging.getLogger(__name__)

DEFAULT_QA_GENERATE_PROMPT_TMPL = search_prompt(STYLES, count=2).format(
    context_str="{context_str}", num_questions_per_chunk="{num_questions_per_chunk}"
)
"""Asks for search queries. If it is passed unchanged, nodes in other languages get the prompt in their language."""


@dataclass(frozen=True)
class _Existing:
    """Existing queries as a generator."""

    queries: list[GeneratedQuery]
    name: str = LLM_WRITTEN

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> list[GeneratedQuery]:
        return self.queries


async def agenerate_qa_embedding_pairs(
    nodes: Sequence[BaseNode],
    llm: LLM,
    qa_generate_prompt_tmpl: str = DEFAULT_QA_GENERATE_PROMPT_TMPL,
    num_questions_per_chunk: int = 2,
    retry_limit: int = 3,
    on_failure: Literal["fail", "continue"] = "continue",
    save_every: int = 500,
    output_path: str = "qa_finetune_dataset.json",
    verbose: bool = True,
) -> EmbeddingQAFinetuneDataset:
    """The asynchronous `generate_qa_embedding_pairs`."""
    if not isinstance(save_every, int) or save_every < 1:
        raise ConfigError(f"save_every={save_every!r}", "a whole number of at least 1", "500 is the default.")
    default = qa_generate_prompt_tmpl == DEFAULT_QA_GENERATE_PROMPT_TMPL
    generator = LLMQueryGenerator(
        llm,
        num_queries=num_questions_per_chunk,
        prompt=None if default else qa_generate_prompt_tmpl,
        journal=f"{output_path}.journal.jsonl",
        settings=LLMSettings(attempts=retry_limit, on_failure=on_failure, show_progress=verbose),
    )
    nodes = list(nodes)
    check_arguments(nodes, [], None)
    queries = _keep_existing_file(nodes, output_path)
    done = {query.node_id for query in queries}
    dataset: EmbeddingQAFinetuneDataset | None = None
    for end in range(save_every, len(nodes) + save_every, save_every):
        chunk = [node for node in nodes[end - save_every : end] if node.node_id not in done]
        queries += await generator.agenerate(chunk)
        if verbose:
            tqdm.write(f"nodes {end - save_every} to {min(end, len(nodes))}: {generator.report}")
        if queries:
            dataset, _ = dataset_from_nodes(nodes[:end], [_Existing(queries)])
            dataset.save_json(output_path)
    if dataset is None:
        raise DatasetError(
            f"no query for {len(nodes)} node(s): {generator.report}",
            "at least one",
            "Check the LLM, and that the nodes have text.",
        )
    return dataset


def generate_qa_embedding_pairs(
    nodes: Sequence[BaseNode],
    llm: LLM,
    qa_generate_prompt_tmpl: str = DEFAULT_QA_GENERATE_PROMPT_TMPL,
    num_questions_per_chunk: int = 2,
    retry_limit: int = 3,
    on_failure: Literal["fail", "continue"] = "continue",
    save_every: int = 500,
    output_path: str = "qa_finetune_dataset.json",
    verbose: bool = True,
) -> EmbeddingQAFinetuneDataset:
    """Let an LLM write queries for nodes: llama-index-finetuning's function with the same signature.

    Differences: requests run concurrently; each answer is at once in a journal (`<output_path>.journal.jsonl`), so that
    an interrupted call continues where it stopped; the default prompt asks for search queries (`prompts.EXAM_PROMPT`
    asks for exam questions); passages are the texts that indexing embeds; query ids are derived from the content.

    An unfinished file of llama-index-finetuning is continued and kept as `<output_path>.llama-index-finetuning`; nodes
    that it has queries for are not sent to the LLM. A file about other nodes is kept as `<output_path>.previous`.

    Args:
        nodes: Nodes with text.
        llm: Any LlamaIndex LLM.
        qa_generate_prompt_tmpl: Prompt with {context_str} and {num_questions_per_chunk}.
        num_questions_per_chunk: Queries for each node.
        retry_limit: Attempts for each node.
        on_failure: "continue" skips a node without a usable answer, "fail" raises.
        save_every: Number of nodes after which the dataset so far is written to `output_path`.
        output_path: JSON file of the dataset that is returned.
        verbose: Show progress and a report on the requests.

    Raises:
        ConfigError: Arguments are wrong.
        DatasetError: There is no query in the end, or nodes share an id.
        LLMError: The LLM fails altogether, or for one node where `on_failure` is "fail".
        JournalError: The journal cannot be used.
    """
    return run_async(
        agenerate_qa_embedding_pairs(
            nodes,
            llm,
            qa_generate_prompt_tmpl,
            num_questions_per_chunk,
            retry_limit,
            on_failure,
            save_every,
            output_path,
            verbose,
        )
    )


def _keep_existing_file(nodes: Sequence[BaseNode], output_path: str) -> list[GeneratedQuery]:
    """Copy a file that is to be replaced; returns llama-index-finetuning's queries for nodes with unchanged text."""
    kept = f"{output_path}.llama-index-finetuning"
    if os.path.exists(output_path):
        existing = EmbeddingQAFinetuneDataset.from_json(output_path)
        if existing.query_origins is None:  # its answers are in no journal, and a later call needs them again
            shutil.copyfile(output_path, kept)
        if others := existing.corpus.keys() - {node.node_id for node in nodes}:  # both corpora got the default path
            previous = f"{output_path}.previous"
            shutil.copyfile(output_path, previous)
            logger.warning("%s had %d passages of other nodes and was copied to %s", output_path, len(others), previous)
    if not os.path.exists(kept):
        return []
    old = EmbeddingQAFinetuneDataset.from_json(kept)
    unchanged = {
        node.node_id
        for node in nodes
        if old.corpus.get(node.node_id) in (embed_text(node), node.get_content(metadata_mode=MetadataMode.NONE))
    }
    return [
        GeneratedQuery(text, passage_id, LLM_WRITTEN)
        for query_id, text in old.queries.items()
        for passage_id in old.relevant_docs.get(query_id, [])[:1]
        if passage_id in unchanged
    ]
