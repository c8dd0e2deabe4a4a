"""What a query generator is, how generators combine, and how nodes carry queries through an ingestion pipeline."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from llama_index.core.bridge.pydantic import ConfigDict, ValidationError, field_validator
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

from llama_index_lora_embed.config.base import config_error
from llama_index_lora_embed.data.origins import origin_name

QUERIES_KEY = "finetune_queries"
"""Metadata key under which a pipeline's nodes carry queries: JSON text, because vector stores want flat values."""
_FORMER_QUERIES_KEY = "finetune_questions"  # in nodes of earlier versions, whose items have "maker" for "generator"

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n{2,}")


@dataclass(frozen=True)
class GeneratedQuery:
    """A synthetic query, or one from a log, and the passage to train it against.

    Attributes:
        text: The query as a user would send it to the retriever.
        node_id: The node that answers it.
        generator: Name of the generator, with the style after a slash ("llm/keywords"); the query's origin in the
            dataset.
        passage: The passage to train against, where it is not the node's own text.
        score: How well the node answers, above 0 and at most 1; it weights the training loss.
    """

    text: str
    node_id: str
    generator: str
    passage: str | None = None
    score: float = 1.0


@runtime_checkable
class QueryGenerator(Protocol):
    """Generates queries from nodes.

    A generator yields any number of queries for each node, or none. The same nodes and the same seed give the same
    queries. Any object with `name` and `generate` is a generator; `NodeQueryGenerator` adds what an `IngestionPipeline`
    needs.

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
        """Name of the generator in reports and in the dataset's `query_origins`."""
        ...

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterable[GeneratedQuery]:
        """Yield queries that these nodes answer."""
        ...


class NodeQueryGenerator(TransformComponent):
    """A query generator that is also a LlamaIndex `TransformComponent`.

    In an `IngestionPipeline` it writes its queries into the metadata of the nodes, under `QUERIES_KEY`, which is
    excluded from what is embedded and from what an LLM reads. `MetadataQueryGenerator` reads them back.

    Raises:
        ConfigError: Arguments are wrong or unknown; all of them are named.
    """

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")

    seed: int = 0
    """Seed of `generate` when the generator is a step of a pipeline."""

    def __init__(self, **kwargs: Any) -> None:
        try:
            super().__init__(**kwargs)
        except ValidationError as error:
            raise config_error(type(self), error) from None

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return cls.__name__

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the generator in reports and in the dataset's `query_origins`."""

    @abstractmethod
    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterable[GeneratedQuery]:
        """Yield queries that these nodes answer."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Attach this generator's queries to the nodes."""
        return attach_queries(nodes, self.generate(nodes, seed=kwargs.get("seed", self.seed)))


class FirstOf(NodeQueryGenerator):
    """For each node, the queries of the first generator that has any.

    `FirstOf(TitleQueryGenerator(), InverseClozeQueryGenerator())` uses inverse cloze, which is further from what users
    type, only for nodes without a title.
    """

    generators: list[Any]
    """Query generators in order of preference."""

    def __init__(self, *generators: QueryGenerator, **kwargs: Any) -> None:
        super().__init__(**{"generators": list(generators), **kwargs})

    @field_validator("generators")
    @classmethod
    def _are_generators(cls, generators: list[Any]) -> list[Any]:
        if not generators or any(isinstance(g, type) or not isinstance(g, QueryGenerator) for g in generators):
            raise ValueError(f"expected query generators, as in FirstOf(first, second), got {generators!r:.200}")
        return generators

    @property
    def name(self) -> str:
        """Names of the generators, joined by "or"."""
        return " or ".join(generator.name for generator in self.generators)

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield queries under the names of the generators that they come from."""
        remaining = list(nodes)
        for generator in self.generators:
            covered = set()
            for query in generator.generate(remaining, seed=seed):
                covered.add(query.node_id)
                yield query
            remaining = [node for node in remaining if node.node_id not in covered]


def attach_queries(nodes: Sequence[BaseNode], queries: Iterable[GeneratedQuery]) -> Sequence[BaseNode]:
    """Add queries to the metadata of their nodes, each of them once; returns the nodes."""
    by_node: dict[str, list[GeneratedQuery]] = defaultdict(list)
    for query in queries:
        by_node[query.node_id].append(query)
    for node in nodes:
        if node.node_id not in by_node:
            continue
        attached = attached_queries(node)
        attached += [query for query in by_node[node.node_id] if query not in attached]
        items = [{k: v for k, v in asdict(q).items() if k != "node_id" and v is not None} for q in attached]
        node.metadata[QUERIES_KEY] = json.dumps(items, ensure_ascii=False)
        for excluded in (node.excluded_embed_metadata_keys, node.excluded_llm_metadata_keys):
            if QUERIES_KEY not in excluded:
                excluded.append(QUERIES_KEY)
    return nodes


def attached_queries(node: BaseNode) -> list[GeneratedQuery]:
    """The queries that `attach_queries` wrote into a node; empty where the metadata is not in its format."""
    try:
        items = json.loads(node.metadata.get(QUERIES_KEY) or node.metadata.get(_FORMER_QUERIES_KEY) or "[]") or []
        for item in items:
            if "maker" in item:
                item["generator"] = origin_name(item.pop("maker"))
        found = [GeneratedQuery(**{**item, "node_id": node.node_id}) for item in items]
    except (AttributeError, TypeError, ValueError):
        return []
    return [query for query in found if isinstance(query.text, str) and isinstance(query.generator, str)]


def embed_text(node: BaseNode) -> str:
    """The node's text exactly as indexing embeds it (LlamaIndex's `MetadataMode.EMBED`)."""
    return node.get_content(metadata_mode=MetadataMode.EMBED)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, split after . ! ? (also full-width) and at blank lines."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]
