"""From nodes and question generators to a dataset, with a count of everything left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, MetadataMode

from llama_index_lora_embed.config import QueryFilterSettings
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset, normalise
from llama_index_lora_embed.data.filters.rules import QueryFilterReport, filter_queries
from llama_index_lora_embed.data.llm.client import LLMReport
from llama_index_lora_embed.data.questions.base import FirstOf, QueryGenerator, embed_text
from llama_index_lora_embed.data.questions.heuristic import InverseClozeQueryGenerator, TitleQueryGenerator
from llama_index_lora_embed.data.split import SplitReport


@dataclass(frozen=True)
class BuildReport:
    """What became of the nodes.

    Attributes:
        nodes: Nodes given.
        passages: Passages in the dataset.
        questions: Questions kept, by generator.
        skipped: Nodes and questions left out, by reason.
        asked: What an LLM was asked, by generator.
        filtered: What the filters dropped; None if there were none.
        split: What went to validation; None if nothing was held out.
    """

    nodes: int
    passages: int
    questions: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    asked: dict[str, LLMReport] = field(default_factory=dict)
    filtered: QueryFilterReport | None = None
    split: SplitReport | None = None

    def __str__(self) -> str:
        """Counts, a line each."""
        lines = [f"{self.passages} passages of {self.nodes} nodes; questions: {_counts(self.questions)}"]
        if self.skipped:
            lines.append(f"left out: {_counts(self.skipped)}")
        lines += [f"{name}: {report}" for name, report in self.asked.items()]
        lines += [str(report) for report in (self.filtered, self.split) if report is not None]
        return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def default_query_generators() -> list[QueryGenerator]:
    """What needs neither labels nor an LLM: a node's title, or inverse cloze where it has none."""
    return [FirstOf(TitleQueryGenerator(), InverseClozeQueryGenerator())]


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
        nodes: LlamaIndex nodes. Those without text (images, say) are counted and left out; those whose text
            another node has already stay in the corpus, but no questions are made about them.
        generators: Question generators, each run over all nodes; None runs `TitleQueryGenerator`, and
            `InverseClozeQueryGenerator` on the nodes that have no title.
        seed: Given to every generator.
        filters: Which questions to drop; None keeps all.
        embed_model: For the round-trip filter: an embedding model, or what makes one when it is needed.

    Returns:
        The dataset, whose corpus is the nodes' texts as indexing embeds them, and the report.

    Raises:
        ConfigError: `nodes` is not a sequence of nodes, a generator lacks `name` or `generate`, or `filters` cannot be
            used.
        DatasetError: Two different nodes share an id, no node has text, or no generator found a question.
    """
    generators = default_query_generators() if generators is None else list(generators)
    _check_arguments(nodes, generators, filters)
    corpus: dict[str, str] = {}
    sources: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    usable: list[BaseNode] = []
    seen_texts: set[str] = set()
    for node in nodes:
        text = embed_text(node)
        if not node.get_content(metadata_mode=MetadataMode.NONE).strip():
            skipped["node without text"] += 1
            continue
        if node.node_id in corpus:
            if corpus[node.node_id] != text:
                raise DatasetError(
                    f"two nodes with different texts under the id {node.node_id!r}",
                    "one id for each node",
                    "Give each node its own id_, or leave it to LlamaIndex.",
                )
            skipped["same node twice"] += 1
            continue
        corpus[node.node_id] = text
        sources[node.node_id] = node.ref_doc_id or node.node_id
        if (key := normalise(text)) in seen_texts:
            skipped["node with another node's text"] += 1  # a question about it would have two answers
            continue
        seen_texts.add(key)
        usable.append(node)
    if not corpus:
        raise DatasetError(
            f"{len(nodes)} node(s), none of them with text",
            "nodes with text",
            "Check the reader and the node parser that made them.",
        )
    dataset = EmbeddingQAFinetuneDataset(
        queries={},
        corpus=corpus,
        relevant_docs={},
        source_documents=sources,
        query_origins={},
        training_passages={},
        relevance_scores={},
    )
    made = _add_questions(dataset, usable, generators, seed, skipped)
    if not dataset.queries:
        names = ", ".join(generator.name for generator in generators)
        raise DatasetError(
            f"no question from {len(usable)} node(s) by {names or 'no generator at all'}",
            "at least one",
            "Pass other generators, or nodes with a title or with two sentences or more.",
        )
    asked = _asked(generators)
    filtered = None
    if filters is not None:
        dataset, filtered = filter_queries(dataset, filters, embed_model=embed_model)
        if not dataset.queries:
            raise DatasetError(
                f"{filtered.given} question(s), of which the filters left none",
                "at least one",
                "Look at what was dropped, and switch filters off: filters=QueryFilterSettings(...) or None.",
                [f"{count} x {reason}" for reason, count in filtered.dropped.items()],
            )
        made = Counter(dataset.origins())
    return dataset, BuildReport(len(nodes), len(corpus), dict(made), dict(skipped), asked, filtered)


def _asked(generators: Iterable[Any]) -> dict[str, LLMReport]:
    """What LLMs were asked, by the name of the generator; a number is added where a name comes again."""
    asked: dict[str, LLMReport] = {}
    for generator in generators:
        found = _asked(getattr(generator, "generators", ()))
        if isinstance(report := getattr(generator, "report", None), LLMReport):
            found[generator.name] = report
        for name, report in found.items():
            again = sum(other.split(" #")[0] == name for other in asked)
            asked[f"{name} #{again + 1}" if again else name] = report
    return asked


def _add_questions(
    dataset: EmbeddingQAFinetuneDataset,
    nodes: list[BaseNode],
    generators: list[QueryGenerator],
    seed: int,
    skipped: Counter[str],
) -> Counter[str]:
    """Add what the generators find to the dataset; returns the number kept by generator."""
    assert dataset.query_origins is not None
    assert dataset.training_passages is not None
    assert dataset.relevance_scores is not None
    made: Counter[str] = Counter()
    asked: set[tuple[str, str]] = set()
    for generator in generators:
        for question in generator.generate(nodes, seed=seed):
            text = question.text.strip()
            if not text or question.node_id not in dataset.corpus:
                skipped["question empty or about no node"] += 1
                continue
            if (normalise(text), question.node_id) in asked:
                skipped["question asked twice of a node"] += 1
                continue
            passage = question.passage if question.passage is not None else dataset.corpus[question.node_id]
            if not passage.strip():
                skipped["question with an empty passage"] += 1
                continue
            asked.add((normalise(text), question.node_id))
            # an id made from the content: the same question gets the same id in every run
            query_id = hashlib.sha256(f"{question.generator}\0{question.node_id}\0{text}".encode()).hexdigest()[:16]
            dataset.queries[query_id] = text
            dataset.relevant_docs[query_id] = [question.node_id]
            dataset.query_origins[query_id] = question.generator
            if passage != dataset.corpus[question.node_id]:
                dataset.training_passages[query_id] = passage
            if question.score != 1:
                dataset.relevance_scores[query_id] = {question.node_id: question.score}
            made[question.generator] += 1
    return made


def _check_arguments(nodes: Any, generators: list[Any], filters: Any) -> None:
    problems: list[str] = []
    if isinstance(nodes, (str, bytes)) or not isinstance(nodes, Sequence):
        problems.append(f"nodes of type {type(nodes).__name__}: expected a list of LlamaIndex nodes")
    else:
        wrong = [i for i, node in enumerate(nodes) if not isinstance(node, BaseNode)]
        if wrong:
            kind = type(nodes[wrong[0]]).__name__
            problems.append(f"nodes[{wrong[0]}] of type {kind} ({len(wrong)} such): expected a LlamaIndex node")
    problems += [
        f"generators[{i}] of type {type(generator).__name__}: expected an object with .name and .generate(nodes, seed=)"
        for i, generator in enumerate(generators)
        if isinstance(generator, type) or not isinstance(generator, QueryGenerator)
    ]
    if isinstance(filters, QueryFilterSettings):
        problems += filters.problems()
    elif filters is not None:
        problems.append(f"filters of type {type(filters).__name__}: expected QueryFilterSettings or None")
    if problems:
        raise ConfigError(
            f"{len(problems)} unusable argument(s)",
            "nodes and question generators",
            "Documents become nodes with SentenceSplitter().get_nodes_from_documents(documents).",
            problems,
        )
