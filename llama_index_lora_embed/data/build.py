"""Nodes and query generators to a dataset, with counts of everything left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, MetadataMode

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.filters.rules import QueryFilterReport, filter_queries
from llama_index_lora_embed.data.llm.client import LLMReport
from llama_index_lora_embed.data.questions.base import FirstOf, GeneratedQuery, QueryGenerator, embed_text
from llama_index_lora_embed.data.questions.heuristic import (
    DefinitionQueryGenerator,
    InverseClozeQueryGenerator,
    LeadQueryGenerator,
    TitleQueryGenerator,
)
from llama_index_lora_embed.data.split import SplitReport
from llama_index_lora_embed.data.text import normalise


@dataclass(frozen=True)
class BuildReport:
    """What was made of the nodes.

    Attributes:
        nodes: Number of nodes given; `passages` of them are in the dataset.
        queries: Queries kept, by generator.
        skipped: Nodes and queries left out, by reason.
        llm_reports: Requests to LLMs, by generator.
        filtered: What the filters dropped; None without filters.
        split: The validation split; None if nothing was held out.
        validated_on: Validation queries by origin where they are not those of the split, because headings were added or
            stand for some of them (`validate_on_headings`), or are trained on; empty elsewhere.
    """

    nodes: int
    passages: int
    queries: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    llm_reports: dict[str, LLMReport] = field(default_factory=dict)
    filtered: QueryFilterReport | None = None
    split: SplitReport | None = None
    validated_on: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.passages} passages of {self.nodes} nodes; queries: {_counts(self.queries)}"]
        if self.skipped:
            lines.append(f"left out: {_counts(self.skipped)}")
        lines += [f"{name}: {report}" for name, report in self.llm_reports.items()]
        lines += [str(report) for report in (self.filtered, self.split) if report is not None]
        if count := sum(self.validated_on.values()):
            lines.append(f"evaluated on {count} queries, with headings: {_counts(self.validated_on)}")
        return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def default_query_generators() -> list[QueryGenerator]:
    """Generators that need neither labels nor an LLM: a node's title, else its first sentence, and what it defines.

    Chosen on the documents of six sets (benchmarks/README.md, "Training without labels").
    """
    return [
        FirstOf(TitleQueryGenerator(), LeadQueryGenerator(), InverseClozeQueryGenerator()),
        DefinitionQueryGenerator(),
    ]


def dataset_from_nodes(
    nodes: Sequence[BaseNode],
    generators: Iterable[QueryGenerator] | None = None,
    *,
    seed: int = 0,
    filters: QueryFilterSettings | None = None,
    embed_model: BaseEmbedding | Callable[[], BaseEmbedding] | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, BuildReport]:
    """Make a dataset from nodes.

    Args:
        nodes: LlamaIndex nodes. Nodes without text (images, for example) are counted and left out; nodes with the
            same text as an earlier one stay in the corpus, but no queries are generated for them.
        generators: Query generators, each run over all nodes; None runs
            `default_query_generators()`.
        seed: Random seed of every generator.
        filters: Which queries to drop; None keeps all.
        embed_model: For the round-trip filter: an embedding model, or a function that makes one when it is needed.

    Returns:
        The dataset, whose corpus is the nodes' texts as indexing embeds them, and the report.

    Raises:
        ConfigError: `nodes` is not a sequence of nodes, or a generator or `filters` has the wrong type.
        DatasetError: Two different nodes share an id, no node has text, or no query was generated or kept.
    """
    generators = default_query_generators() if generators is None else list(generators)
    check_arguments(nodes, generators, filters)
    skipped: Counter[str] = Counter()
    corpus, sources, usable = passages_of(nodes, skipped)
    queries = _queries(corpus, usable, generators, seed, skipped)
    if not queries:
        names = ", ".join(generator.name for generator in generators)
        raise DatasetError(
            f"no query from {len(usable)} node(s) by {names or 'no generator at all'}",
            "at least one",
            "Pass other generators, or nodes with a title or with at least two sentences.",
        )
    dataset = EmbeddingQAFinetuneDataset(
        queries={i: query.text for i, query in queries.items()},
        corpus=corpus,
        relevant_docs={i: [query.node_id] for i, query in queries.items()},
        source_documents=sources,
        query_origins={i: query.generator for i, query in queries.items()},
        training_passages={
            i: query.passage
            for i, query in queries.items()
            if query.passage is not None and query.passage != corpus[query.node_id]
        },
        relevance_scores={i: {query.node_id: query.score} for i, query in queries.items() if query.score != 1},
    )
    llm_reports = _llm_reports(generators)
    filtered = None
    if filters is not None:
        dataset, filtered = filter_queries(dataset, filters, embed_model=embed_model)
        if not dataset.queries:
            raise DatasetError(
                f"{filtered.given} queries, of which the filters kept none",
                "at least one",
                "Look at what was dropped, and switch filters off: filters=QueryFilterSettings(...) or None.",
                [f"{count} x {reason}" for reason, count in filtered.dropped.items()],
            )
    return dataset, BuildReport(len(nodes), len(corpus), dataset.origins(), dict(skipped), llm_reports, filtered)


def passages_of(
    nodes: Sequence[BaseNode], skipped: Counter[str]
) -> tuple[dict[str, str], dict[str, str], list[BaseNode]]:
    """(passages by node id, their source documents, the first node of each text); counts what it leaves out.

    Raises:
        DatasetError: Two different nodes share an id, or no node has text.
    """
    corpus: dict[str, str] = {}
    sources: dict[str, str] = {}
    first_nodes: dict[str, BaseNode] = {}
    for node in nodes:
        text = embed_text(node)
        if not node.get_content(metadata_mode=MetadataMode.NONE).strip():
            skipped["node without text"] += 1
        elif corpus.get(node.node_id, text) != text:
            raise DatasetError(
                f"two nodes with different texts under the id {node.node_id!r}",
                "one id for each node",
                "Give each node its own id_, or leave it to LlamaIndex.",
            )
        elif node.node_id in corpus:
            skipped["same node twice"] += 1
        else:
            corpus[node.node_id] = text
            sources[node.node_id] = node.ref_doc_id or node.node_id
            if first_nodes.setdefault(normalise(text), node) is not node:
                skipped["node with another node's text"] += 1  # a query about it would have two answers
    if not corpus:
        raise DatasetError(
            f"{len(nodes)} node(s), none of them with text",
            "nodes with text",
            "Check the reader and the node parser that made them.",
        )
    return corpus, sources, list(first_nodes.values())


def _queries(
    corpus: dict[str, str],
    nodes: list[BaseNode],
    generators: list[QueryGenerator],
    seed: int,
    skipped: Counter[str],
) -> dict[str, GeneratedQuery]:
    """The generators' usable queries by id; ids come from the content, so that they are the same in every run."""
    queries: dict[str, GeneratedQuery] = {}
    seen: set[tuple[str, str]] = set()
    for generator in generators:
        for query in generator.generate(nodes, seed=seed):
            query = replace(query, text=query.text.strip())
            key = (normalise(query.text), query.node_id)
            if not query.text or query.node_id not in corpus:
                skipped["query empty or about no node"] += 1
            elif key in seen:
                skipped["query repeated for the same node"] += 1
            elif query.passage is not None and not query.passage.strip():
                skipped["query with an empty passage"] += 1
            else:
                seen.add(key)
                content = f"{query.generator}\0{query.node_id}\0{query.text}"
                queries[hashlib.sha256(content.encode()).hexdigest()[:16]] = query
    return queries


def _llm_reports(generators: Iterable[Any]) -> dict[str, LLMReport]:
    """Reports of requests to LLMs by the generator's name; repeated names get a number."""
    reports: dict[str, LLMReport] = {}
    for generator in generators:
        found = _llm_reports(getattr(generator, "generators", ()))
        if isinstance(report := getattr(generator, "report", None), LLMReport):
            found[generator.name] = report
        for name, report in found.items():
            again = sum(other.split(" #")[0] == name for other in reports)
            reports[f"{name} #{again + 1}" if again else name] = report
    return reports


def check_arguments(nodes: Any, generators: list[Any], filters: Any) -> None:
    """Raise `ConfigError` unless they are what `dataset_from_nodes` takes."""
    problems: list[str] = []
    if isinstance(nodes, (str, bytes)) or not isinstance(nodes, Sequence):
        problems.append(f"nodes of type {type(nodes).__name__}: expected a list of LlamaIndex nodes")
    elif wrong := [i for i, node in enumerate(nodes) if not isinstance(node, BaseNode)]:
        kind = type(nodes[wrong[0]]).__name__
        problems.append(f"nodes[{wrong[0]}] of type {kind} ({len(wrong)} in all): expected a LlamaIndex node")
    problems += [
        f"generators[{i}] of type {type(generator).__name__}: expected an object with .name and .generate(nodes, seed=)"
        for i, generator in enumerate(generators)
        if isinstance(generator, type) or not isinstance(generator, QueryGenerator)
    ]
    if not isinstance(filters, (QueryFilterSettings, type(None))):
        problems.append(f"filters of type {type(filters).__name__}: expected QueryFilterSettings or None")
    if problems:
        raise ConfigError(
            f"{len(problems)} unusable argument(s)",
            "nodes and query generators",
            "Documents become nodes with SentenceSplitter().get_nodes_from_documents(documents).",
            problems,
        )
