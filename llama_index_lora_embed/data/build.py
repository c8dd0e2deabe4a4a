"""From nodes and question makers to a dataset, with a count of everything left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, MetadataMode

from llama_index_lora_embed.config import FilterSettings
from llama_index_lora_embed.data.asking import AskReport
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset, normalise
from llama_index_lora_embed.data.filters import FilterReport, filter_questions
from llama_index_lora_embed.data.makers import InverseClozeMaker, TitleMaker
from llama_index_lora_embed.data.questions import FirstOf, QuestionMaker, embed_text
from llama_index_lora_embed.data.split import SplitReport
from llama_index_lora_embed.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class BuildReport:
    """What became of the nodes.

    Attributes:
        nodes: Nodes given.
        passages: Passages in the dataset.
        questions: Questions kept, by maker.
        skipped: Nodes and questions left out, by reason.
        asked: What an LLM was asked, by maker.
        filtered: What the filters dropped; None if there were none.
        split: What went to validation; None if nothing was held out.
    """

    nodes: int
    passages: int
    questions: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    asked: dict[str, AskReport] = field(default_factory=dict)
    filtered: FilterReport | None = None
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


def default_makers() -> list[QuestionMaker]:
    """What needs neither labels nor an LLM: a node's title, or inverse cloze where it has none."""
    return [FirstOf(TitleMaker(), InverseClozeMaker())]


def dataset_from_nodes(
    nodes: Sequence[BaseNode],
    makers: Iterable[QuestionMaker] | None = None,
    *,
    seed: int = 0,
    filters: FilterSettings | None = None,
    embed_model: BaseEmbedding | Callable[[], BaseEmbedding] | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, BuildReport]:
    """Make a dataset from nodes.

    Args:
        nodes: LlamaIndex nodes. Those without text (images, say) are counted and left out; those whose text
            another node has already stay in the corpus, but no questions are made about them.
        makers: Question makers, each run over all nodes; None runs `TitleMaker`, and
            `InverseClozeMaker` on the nodes that have no title.
        seed: Given to every maker.
        filters: Which questions to drop; None keeps all.
        embed_model: For the round-trip filter: an embedding model, or what makes one when it is needed.

    Returns:
        The dataset, whose corpus is the nodes' texts as indexing embeds them, and the report.

    Raises:
        ConfigError: `nodes` is not a sequence of nodes, a maker lacks `name` or `make`, or `filters` cannot be used.
        DatasetError: Two different nodes share an id, no node has text, or no maker found a question.
    """
    makers = default_makers() if makers is None else list(makers)
    _check_arguments(nodes, makers, filters)
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
    made = _add_questions(dataset, usable, makers, seed, skipped)
    if not dataset.queries:
        names = ", ".join(maker.name for maker in makers)
        raise DatasetError(
            f"no question from {len(usable)} node(s) by {names or 'no maker at all'}",
            "at least one",
            "Pass other makers, or nodes with a title or with two sentences or more.",
        )
    asked = _asked(makers)
    filtered = None
    if filters is not None:
        dataset, filtered = filter_questions(dataset, filters, embed_model=embed_model)
        if not dataset.queries:
            raise DatasetError(
                f"{filtered.given} question(s), of which the filters left none",
                "at least one",
                "Look at what was dropped, and switch filters off with filters=FilterSettings(...) or filters=None:",
                [f"{count} x {reason}" for reason, count in filtered.dropped.items()],
            )
        made = Counter(dataset.origins())
    return dataset, BuildReport(len(nodes), len(corpus), dict(made), dict(skipped), asked, filtered)


def _asked(makers: Iterable[Any]) -> dict[str, AskReport]:
    """What LLMs were asked, by the name of the maker; a number is added where a name comes again."""
    asked: dict[str, AskReport] = {}
    for maker in makers:
        found = _asked(getattr(maker, "makers", ()))
        if isinstance(report := getattr(maker, "report", None), AskReport):
            found[maker.name] = report
        for name, report in found.items():
            again = sum(other.split(" #")[0] == name for other in asked)
            asked[f"{name} #{again + 1}" if again else name] = report
    return asked


def _add_questions(
    dataset: EmbeddingQAFinetuneDataset,
    nodes: list[BaseNode],
    makers: list[QuestionMaker],
    seed: int,
    skipped: Counter[str],
) -> Counter[str]:
    """Add what the makers find to the dataset; returns the number kept by maker."""
    assert dataset.query_origins is not None
    assert dataset.training_passages is not None
    assert dataset.relevance_scores is not None
    made: Counter[str] = Counter()
    asked: set[tuple[str, str]] = set()
    for maker in makers:
        for question in maker.make(nodes, seed=seed):
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
            query_id = hashlib.sha256(f"{question.maker}\0{question.node_id}\0{text}".encode()).hexdigest()[:16]
            dataset.queries[query_id] = text
            dataset.relevant_docs[query_id] = [question.node_id]
            dataset.query_origins[query_id] = question.maker
            if passage != dataset.corpus[question.node_id]:
                dataset.training_passages[query_id] = passage
            if question.score != 1:
                dataset.relevance_scores[query_id] = {question.node_id: question.score}
            made[question.maker] += 1
    return made


def _check_arguments(nodes: Any, makers: list[Any], filters: Any) -> None:
    problems: list[str] = []
    if isinstance(nodes, (str, bytes)) or not isinstance(nodes, Sequence):
        problems.append(f"nodes of type {type(nodes).__name__}: expected a list of LlamaIndex nodes")
    else:
        wrong = [i for i, node in enumerate(nodes) if not isinstance(node, BaseNode)]
        if wrong:
            kind = type(nodes[wrong[0]]).__name__
            problems.append(f"nodes[{wrong[0]}] of type {kind} ({len(wrong)} such): expected a LlamaIndex node")
    problems += [
        f"makers[{i}] of type {type(maker).__name__}: expected an object with .name and .make(nodes, seed=...)"
        for i, maker in enumerate(makers)
        if isinstance(maker, type) or not isinstance(maker, QuestionMaker)
    ]
    if isinstance(filters, FilterSettings):
        problems += filters.problems()
    elif filters is not None:
        problems.append(f"filters of type {type(filters).__name__}: expected FilterSettings or None")
    if problems:
        raise ConfigError(
            f"{len(problems)} unusable argument(s)",
            "nodes and question makers",
            "Documents become nodes with SentenceSplitter().get_nodes_from_documents(documents).",
            problems,
        )
