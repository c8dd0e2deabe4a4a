"""Question makers: from nodes to questions that they answer.

`QuestionMaker` is the Protocol; two makers here need neither labels nor an LLM.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from llama_index.core.schema import BaseNode, MetadataMode

_TITLE_KEYS = ("title", "document_title", "section", "heading", "section_title", "Header_1", "Header 1")
_HEADINGS = (
    re.compile(r"\A\s*#{1,6}\s+(?P<heading>[^\n]+?)\s*#*\s*(?:\n|\Z)"),  # Markdown
    re.compile(r"\A\s*(?P<heading>[^\n]+)\n(?P<mark>[*=~^-])(?P=mark){2,}[ \t]*(?:\n|\Z)"),  # underlined, as in reST
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n{2,}")


@dataclass(frozen=True)
class Question:
    """One question and what it is to be trained against.

    Attributes:
        text: The question as a user would send it to the retriever.
        node_id: The node that answers it.
        maker: Name of the maker; becomes the query's origin in the dataset.
        passage: The text to train against, where that is not the node's own.
    """

    text: str
    node_id: str
    maker: str
    passage: str | None = None


@runtime_checkable
class QuestionMaker(Protocol):
    """Makes questions from nodes.

    A maker yields any number of questions for any of the nodes; it skips a node that gives it nothing, and
    given the same nodes and seed it yields the same questions.

    Example:
        >>> class FileNameMaker:
        ...     name = "file_name"
        ...     def make(self, nodes, *, seed=0):
        ...         for node in nodes:
        ...             if file_name := node.metadata.get("file_name"):
        ...                 yield Question(file_name, node.node_id, self.name)
        >>> isinstance(FileNameMaker(), QuestionMaker)
        True
    """

    name: str

    def make(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterable[Question]:
        """Yield questions about these nodes."""
        ...


def embed_text(node: BaseNode) -> str:
    """The node's text exactly as indexing embeds it (LlamaIndex's `MetadataMode.EMBED`)."""
    return node.get_content(metadata_mode=MetadataMode.EMBED)


class TitleMaker:
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

    name = "title"

    def __init__(self, max_nodes_per_title: int = 3, max_words: int = 30) -> None:
        self.max_nodes_per_title = max_nodes_per_title
        self.max_words = max_words

    def make(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[Question]:
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
                yield Question(title, node.node_id, self.name, passage)


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


class InverseClozeMaker:
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

    name = "inverse_cloze"

    def __init__(self, per_node: int = 1, keep_rate: float = 0.1, min_words: int = 4, max_words: int = 40) -> None:
        self.per_node = per_node
        self.keep_rate = keep_rate
        self.min_words = min_words
        self.max_words = max_words

    def make(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[Question]:
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
                yield Question(query, node.node_id, self.name, passage)


class FirstOf:
    """Asks several makers about each node and takes the questions of the first that has any.

    So a node with a title gets the question that its title is, and inverse cloze, which is further from what
    people ask, serves the nodes that have none.

    Args:
        *makers: In order of preference.
    """

    def __init__(self, *makers: QuestionMaker) -> None:
        self.makers = makers
        self.name = " or ".join(maker.name for maker in makers)

    def make(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[Question]:
        """Yield questions, each under the name of the maker that made it."""
        left = list(nodes)
        for maker in self.makers:
            asked = set()
            for question in maker.make(left, seed=seed):
                asked.add(question.node_id)
                yield question
            left = [node for node in left if node.node_id not in asked]


def split_sentences(text: str) -> list[str]:
    """Sentences as they stand in the text, split after . ! ? (also full-width) and at blank lines."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]
