"""What a question generator is, how generators combine, and how nodes carry questions through a pipeline."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

QUERIES_KEY = "finetune_questions"
"""Metadata key under which a pipeline's nodes carry questions: JSON text, because vector stores want flat values."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n{2,}")


@dataclass(frozen=True)
class GeneratedQuery:
    """One question and what it is to be trained against.

    Attributes:
        text: The question as a user would send it to the retriever.
        node_id: The node that answers it.
        generator: Name of the generator, with the style after a slash ("llm/keywords"); the query's origin in the
            dataset.
        passage: The text to train against, where that is not the node's own.
        score: How well the node answers, above 0 and at most 1; training weighs by it.
    """

    text: str
    node_id: str
    generator: str
    passage: str | None = None
    score: float = 1.0


@runtime_checkable
class QueryGenerator(Protocol):
    """Makes questions from nodes.

    A generator yields any number of questions for any of the nodes; it skips a node that gives it nothing, and
    given the same nodes and seed it yields the same questions. Any object with `name` and `generate` will do;
    `NodeQueryGenerator` adds what an `IngestionPipeline` needs.

    Example:
        >>> class FileNameQueryGenerator:
        ...     name = "file_name"
        ...     def generate(self, nodes, *, seed=0):
        ...         for node in nodes:
        ...             if file_name := node.metadata.get("file_name"):
        ...                 yield GeneratedQuery(file_name, node.node_id, self.name)
        >>> isinstance(FileNameQueryGenerator(), QueryGenerator)
        True
    """

    @property
    def name(self) -> str:
        """What its questions are called in reports and verdicts."""
        ...

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterable[GeneratedQuery]:
        """Yield questions about these nodes."""
        ...


class NodeQueryGenerator(TransformComponent):
    """A question generator that is a LlamaIndex `TransformComponent` too.

    In an `IngestionPipeline` its questions travel in the nodes' metadata, under `QUERIES_KEY`, which is kept
    out of what is embedded and of what an LLM reads. `MetadataQueryGenerator` takes them out again.

    Attributes:
        seed: Used in a pipeline, where nobody hands one in.
    """

    seed: int = Field(default=0, description="Seed of a run in a pipeline.")

    @property
    @abstractmethod
    def name(self) -> str:
        """What its questions are called in reports and verdicts."""

    @abstractmethod
    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterable[GeneratedQuery]:
        """Yield questions about these nodes."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Attach this generator's questions to the nodes."""
        return attach_queries(nodes, self.generate(nodes, seed=kwargs.get("seed", self.seed)))


class FirstOf(NodeQueryGenerator):
    """Asks several generators about each node and takes the questions of the first that has any.

    So a node with a title gets the question that its title is, and inverse cloze, which is further from what
    people ask, serves the nodes that have none.

    Args:
        *generators: In order of preference.
    """

    generators: list[Any] = Field(description="Question generators in order of preference.")

    def __init__(self, *generators: QueryGenerator, **kwargs: Any) -> None:
        super().__init__(**{"generators": list(generators), **kwargs})

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return "FirstOf"

    @property
    def name(self) -> str:
        """The generators' names."""
        return " or ".join(generator.name for generator in self.generators)

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield questions, each under the name of the generator that made it."""
        left = list(nodes)
        for generator in self.generators:
            asked = set()
            for question in generator.generate(left, seed=seed):
                asked.add(question.node_id)
                yield question
            left = [node for node in left if node.node_id not in asked]


def attach_queries(nodes: Sequence[BaseNode], questions: Iterable[GeneratedQuery]) -> Sequence[BaseNode]:
    """Write questions into the metadata of their nodes, after those already there; returns the nodes."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for question in questions:
        found[question.node_id].append({k: v for k, v in asdict(question).items() if k != "node_id" and v is not None})
    for node in nodes:
        if node.node_id not in found:
            continue
        carried = json.loads(node.metadata.get(QUERIES_KEY, "[]"))
        carried += [item for item in found[node.node_id] if item not in carried]
        node.metadata[QUERIES_KEY] = json.dumps(carried, ensure_ascii=False)
        for excluded in (node.excluded_embed_metadata_keys, node.excluded_llm_metadata_keys):
            if QUERIES_KEY not in excluded:
                excluded.append(QUERIES_KEY)
    return nodes


def attached_queries(node: BaseNode) -> list[GeneratedQuery]:
    """The questions that `attach_queries` wrote into a node; what is not in its format is left out."""
    try:
        items = json.loads(node.metadata.get(QUERIES_KEY) or "[]")
        found = [GeneratedQuery(**{**item, "node_id": node.node_id}) for item in items or []]
    except (TypeError, ValueError):
        return []
    return [q for q in found if isinstance(q.text, str) and isinstance(q.generator, str)]


def embed_text(node: BaseNode) -> str:
    """The node's text exactly as indexing embeds it (LlamaIndex's `MetadataMode.EMBED`)."""
    return node.get_content(metadata_mode=MetadataMode.EMBED)


def split_sentences(text: str) -> list[str]:
    """Sentences as they stand in the text, split after . ! ? (also full-width) and at blank lines."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]
