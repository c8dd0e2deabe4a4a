"""Question generators that need no LLM."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import ClassVar

from llama_index.core.bridge.pydantic import Field, field_validator
from llama_index.core.schema import BaseNode, MetadataMode

from llama_index_lora_embed.data.questions.base import (
    GeneratedQuery,
    NodeQueryGenerator,
    attached_queries,
    embed_text,
    split_sentences,
)
from llama_index_lora_embed.data.questions.parsing import parse_queries

_TITLE_KEYS = ("title", "document_title", "section", "heading", "section_title", "Header_1", "Header 1")
_HEADINGS = (
    re.compile(r"\A\s*#{1,6}\s+(?P<heading>[^\n]+?)\s*#*\s*(?:\n|\Z)"),  # Markdown
    re.compile(r"\A\s*(?P<heading>[^\n]+)\n(?P<mark>[*=~^-])(?P=mark){2,}[ \t]*(?:\n|\Z)"),  # underlined, as in reST
)


class TitleQueryGenerator(NodeQueryGenerator):
    """A node's title or heading becomes the query for its body.

    The title is looked for in the metadata (LlamaIndex's `TitleExtractor`, `MarkdownNodeParser` and usual
    readers), then as a heading at the top of the text (Markdown or underlined), then as a question that opens
    the text, as in FAQs. It is taken out of the text that is trained against, so that matching words is not enough.

    A title that many nodes share says little about each of them; beyond `max_nodes_per_title` nodes only the
    first ones get it.

    Args:
        max_nodes_per_title: Nodes that may share one title.
        max_words: Longer "titles" are left alone.
    """

    max_nodes_per_title: int = Field(default=3, ge=1, description="Nodes that may share one title.")
    max_words: int = Field(default=30, ge=1, description="Longer titles are left alone.")
    name: ClassVar[str] = "title"

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return "TitleQueryGenerator"

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield one question for each node that has a title; the seed changes nothing."""
        used: dict[str, int] = {}
        for node in nodes:
            found = _metadata_title(node) or _opening_title(node)
            if found is None:
                continue
            title, passage = found
            key = title.lower()
            if not title or len(title.split()) > self.max_words or not passage.strip():
                continue
            used[key] = used.get(key, 0) + 1
            if used[key] <= self.max_nodes_per_title:
                yield GeneratedQuery(title, node.node_id, self.name, passage)


def _metadata_title(node: BaseNode) -> tuple[str, str] | None:
    """(title, embedded text without the metadata line that says it), or None."""
    body = node.get_content(metadata_mode=MetadataMode.NONE)
    for key in _TITLE_KEYS:
        title = node.metadata.get(key)
        if not isinstance(title, str) or not title.strip() or not body.strip():
            continue
        bare = node.model_copy(deep=True)
        bare.excluded_embed_metadata_keys = [*bare.excluded_embed_metadata_keys, key]
        title = " ".join(title.split())
        return title, embed_text(bare)
    return None


def _opening_title(node: BaseNode) -> tuple[str, str] | None:
    body = node.get_content(metadata_mode=MetadataMode.NONE)
    if match := next(filter(None, (heading.match(body) for heading in _HEADINGS)), None):
        title, spoken = match["heading"], match[0]
    else:
        sentences = split_sentences(body)
        if len(sentences) < 2 or not sentences[0].endswith(("?", "？")):
            return None
        title = spoken = sentences[0]
    rest = body.replace(spoken, "", 1).strip()
    if len(rest.split()) < 3:
        return None
    return " ".join(title.split()), embed_text(node).replace(body, rest, 1)


class InverseClozeQueryGenerator(NodeQueryGenerator):
    """Inverse cloze: a sentence becomes the query, its node without the sentence the passage.

    Lee, Chang and Toutanova, "Latent Retrieval for Weakly Supervised Open Domain Question Answering" (ACL
    2019), section 4; keeping the sentence in the passage one time in ten is theirs too: it teaches that
    matching words matter.

    Args:
        per_node: Questions for each node, as far as it has sentences.
        keep_rate: Share of passages that keep the sentence.
        min_words: Shorter sentences are left out.
        max_words: Longer sentences are cut to this many words.
    """

    per_node: int = Field(default=1, ge=1, description="Questions for each node.")
    keep_rate: float = Field(default=0.1, ge=0, le=1, description="Share of passages that keep the sentence.")
    min_words: int = Field(default=4, ge=1, description="Shorter sentences are left out.")
    max_words: int = Field(default=40, ge=1, description="Longer sentences are cut.")
    name: ClassVar[str] = "inverse_cloze"

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return "InverseClozeQueryGenerator"

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield up to `per_node` questions for each node with two sentences or more."""
        for node in nodes:
            body = node.get_content(metadata_mode=MetadataMode.NONE)
            sentences = split_sentences(body)
            usable = [s for s in sentences if len(s.split()) >= self.min_words]
            if len(sentences) < 2 or not usable:
                continue
            text = embed_text(node)
            # seeded by node, so that a node's question does not depend on its neighbours
            rng = random.Random(f"{seed}:{node.node_id}")
            for sentence in rng.sample(usable, min(self.per_node, len(usable))):
                keep = rng.random() < self.keep_rate
                passage = text if keep else text.replace(sentence, "", 1).strip()
                query = " ".join(sentence.split()[: self.max_words])
                yield GeneratedQuery(query, node.node_id, self.name, passage)


class NeighbourQueryGenerator(NodeQueryGenerator):
    """Adjacent chunks: a chunk is the query, the chunks that follow it in its document answer it, with grades.

    It teaches which passages belong together. A chunk is no question that a user would type, so that these
    questions are for mixing with others. Nodes count as adjacent in the order in which they are given, within
    one source document.

    Args:
        scores: Grade of the next chunk, of the next but one, and so on, each above 0 and at most 1.
    """

    scores: tuple[float, ...] = Field(default=(0.9, 0.7), description="Grades by distance, nearest first.")
    name: ClassVar[str] = "neighbour"

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return "NeighbourQueryGenerator"

    @field_validator("scores")
    @classmethod
    def _graded(cls, scores: tuple[float, ...]) -> tuple[float, ...]:
        if not scores or not all(0 < score <= 1 for score in scores):
            raise ValueError("expected at least one grade, each above 0 and at most 1")
        return scores

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield up to `len(scores)` questions for each node that another follows; the seed changes nothing."""
        by_document: dict[str, list[BaseNode]] = defaultdict(list)
        for node in nodes:
            if node.ref_doc_id is not None and node.get_content(metadata_mode=MetadataMode.NONE).strip():
                by_document[node.ref_doc_id].append(node)
        for chunks in by_document.values():
            for place, chunk in enumerate(chunks):
                query = embed_text(chunk)
                for score, answer in zip(self.scores, chunks[place + 1 :], strict=False):
                    yield GeneratedQuery(query, answer.node_id, self.name, score=score)


class MetadataQueryGenerator(NodeQueryGenerator):
    """Questions that nodes bring along.

    Reads what question generators in an `IngestionPipeline` wrote, and the texts of LlamaIndex's
    `QuestionsAnsweredExtractor`. The latter are embedded together with their node; a question is trained
    against the node without them, or it would only learn to find itself.

    Args:
        keys: Metadata keys that hold questions as text, a line each.
    """

    keys: tuple[str, ...] = Field(
        default=("questions_this_excerpt_can_answer",), description="Metadata keys that hold questions."
    )
    name: ClassVar[str] = "carried"

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return "MetadataQueryGenerator"

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield the questions, those of a pipeline under the names of their generators; the seed changes nothing."""
        for node in nodes:
            yield from attached_queries(node)
            texts = [text for key in self.keys if isinstance(text := node.metadata.get(key), str)]
            if not texts:
                continue
            bare = node.model_copy(deep=True)
            bare.excluded_embed_metadata_keys = [*bare.excluded_embed_metadata_keys, *self.keys]
            for text in texts:
                for answer in parse_queries(text):
                    yield GeneratedQuery(answer.text, node.node_id, self.name, embed_text(bare))
