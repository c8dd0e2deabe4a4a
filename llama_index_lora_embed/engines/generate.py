"""From a configuration and nodes to queries, for a run or alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode

from llama_index_lora_embed.config import FinetuneConfig
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data import (
    BuildReport,
    EmbeddingQAFinetuneDataset,
    LLMQueryGenerator,
    QueryGenerator,
    dataset_from_nodes,
    split_by_source,
)
from llama_index_lora_embed.data.readers.nodes import read_nodes
from llama_index_lora_embed.engines.starting_model import StartingModel

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.llms import LLM


@dataclass(frozen=True)
class GeneratedData:
    """Queries for nodes.

    Attributes:
        dataset: The queries with their passages.
        val_dataset: What was held out of them; None if nothing was.
        report: What became of the nodes.
    """

    dataset: EmbeddingQAFinetuneDataset = field(repr=False)
    val_dataset: EmbeddingQAFinetuneDataset | None = field(repr=False)
    report: BuildReport


def generate_dataset(
    config: FinetuneConfig,
    *,
    nodes: Sequence[BaseNode] | None = None,
    llm: LLM | None = None,
    journal: str | os.PathLike[str] | None = None,
    split: bool = False,
) -> GeneratedData:
    """The queries that `run_finetune` would train on, without a run.

    Args:
        config: Its `data` names nodes, generators and filters; its `base` embeds for the round-trip filter.
        nodes: LlamaIndex nodes, instead of `config.data.nodes`.
        llm: Writes the queries.
        journal: File of the LLM's answers; None for the one that a run of this configuration keeps.
        split: Hold out `config.data.val_fraction` by source document.

    Raises:
        ConfigError: There are no nodes, or generators are wrong.
        DatasetError: No query could be generated.
        SplitError: The nodes come from one document, so that none can be held out.
    """
    data = config.data
    if nodes is None:
        if data.nodes is None:
            raise ConfigError(
                "data.nodes=None", "a folder of documents or a JSONL file of nodes", "Name it, or pass nodes=."
            )
        nodes = read_nodes(data.nodes)
    kept = journal_of(config) if journal is None else os.fspath(journal)
    generators: list[QueryGenerator] | None = None
    if data.query_generators is not None:
        generators = generators_of(config, llm, kept)
    elif llm is not None:
        generators = [LLMQueryGenerator(llm=llm, journal=kept)]
    dataset, report = queries_for(config, nodes, generators)
    held_out = None
    if split:
        dataset, held_out = split_by_source(
            dataset, data.val_fraction, seed=config.training.seed, max_passages=data.max_eval_passages
        )
    return GeneratedData(dataset, held_out, report)


def queries_for(
    config: FinetuneConfig,
    nodes: Sequence[BaseNode],
    generators: Sequence[QueryGenerator] | None,
    embed_model: BaseEmbedding | Callable[[], BaseEmbedding] | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, BuildReport]:
    """`dataset_from_nodes` with the seed and the filters of a configuration, whose base looks for the passages."""
    return dataset_from_nodes(
        nodes,
        generators,
        seed=config.training.seed,
        filters=config.data.filters,
        embed_model=embed_model or StartingModel(config).embedding,
    )


def journal_of(config: FinetuneConfig) -> str:
    """Where the answers of an LLM are kept: beside the output."""
    return f"{os.path.abspath(os.path.expanduser(config.output.model_output_path))}.queries.jsonl"


def generators_of(config: FinetuneConfig, llm: LLM | None, journal: str) -> list[QueryGenerator]:
    """The generators that a configuration names.

    Args:
        config: Names them.
        llm: Writes the queries of the generator "llm".
        journal: Where its answers are kept, unless the configuration says so.

    Raises:
        ConfigError: Options are wrong, or there is no LLM; all problems are named.
    """
    from llama_index_lora_embed import data

    classes: dict[str, Any] = {
        "title": data.TitleQueryGenerator,
        "lead": data.LeadQueryGenerator,
        "definition": data.DefinitionQueryGenerator,
        "inverse_cloze": data.InverseClozeQueryGenerator,
        "neighbour": data.NeighbourQueryGenerator,
        "metadata": data.MetadataQueryGenerator,
        "query_log": data.QueryLogGenerator,
        "llm": LLMQueryGenerator,
    }
    made: list[QueryGenerator] = []
    problems: list[str] = []
    for number, settings in enumerate(config.data.query_generators or ()):
        path, options = f"data.query_generators[{number}]", settings.options
        if settings.kind == "llm":
            if llm is None:
                problems.append(f"{path}: 'llm' without an LLM: expected one, as in run_finetune(..., llm=llm)")
                continue
            options = {"llm": llm, "journal": journal, **options}
        try:
            made.append(classes[settings.kind](**options))
        except (ConfigError, TypeError) as error:  # Python's own where an option without a default is missing
            found = getattr(error, "problems", None) or [str(error)]
            problems += [f"{path}.options: {problem}" for problem in found]
    if problems:
        raise ConfigError(f"{len(problems)} problem(s)", "query generators without any", "Correct them:", problems)
    return made
