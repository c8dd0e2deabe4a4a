"""Query generators that need no LLM."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import BaseNode, MetadataMode

from llama_index_lora_embed.config.base import AtLeast1, Share, ShareAbove0
from llama_index_lora_embed.data.origins import DEFINITION, INVERSE_CLOZE, LEAD, METADATA, NEIGHBOUR, TITLE
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
_LINE_WORDS = 20  # longest line that is taken for a title
_METADATA_LINE = re.compile(r"[\w .-]{1,40}: ")  # as LlamaIndex writes a node's metadata above its text
_FEWEST_LEFT = 10  # words of a passage without its first sentence
_SENTENCES_TO_DEFINE = 3
_DEFINITION = re.compile(
    r"(?P<term>[A-Z0-9][^.!?,;:]{2,80}?)\s*(?:\([^)]*\))?\s*,?\s+"
    r"(?:is|are|was|were|refers?\s+to|means)\s+"
    r"(?:an?|the|one|any|two|types?|caused|used|defined|characterized|inherited)\b"
)
_NO_TERMS = re.compile(
    r"(?:it|this|these|they|there|that|those|he|she|we|you|i|which|what|one|who|if|when|in|as|for|most|some|many|such)\b",
    re.IGNORECASE,
)


class TitleQueryGenerator(NodeQueryGenerator):
    """A node's title or heading becomes the query for its body.

    The title is looked for in the metadata (LlamaIndex's `TitleExtractor`, `MarkdownNodeParser` and common readers),
    then as a heading at the top of the text (Markdown or underlined), then as a line that is set apart there, then as a
    question that opens the text, as in FAQs. It is removed from the passage, so that matching words is not enough.

    A title that many nodes share says little about each of them, so that only the first `max_nodes_per_title` nodes get
    it.
    """

    max_nodes_per_title: AtLeast1 = 3
    """Nodes that may share one title."""
    max_words: AtLeast1 = 30
    """Longer titles are ignored."""
    name: ClassVar[str] = TITLE

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield one query for each node that has a title; the seed has no effect."""
        uses: Counter[str] = Counter()
        for node in nodes:
            title, passage = _metadata_title(node) or _opening_title(node) or ("", "")
            if not title or len(title.split()) > self.max_words or not passage.strip():
                continue
            uses[title.lower()] += 1
            if uses[title.lower()] <= self.max_nodes_per_title:
                yield GeneratedQuery(title, node.node_id, self.name, passage)


def _metadata_title(node: BaseNode) -> tuple[str, str] | None:
    """(title, embedded text without the title's metadata line), or None."""
    if not node.get_content(metadata_mode=MetadataMode.NONE).strip():
        return None
    for key in _TITLE_KEYS:
        title = node.metadata.get(key)
        if isinstance(title, str) and title.strip():
            return " ".join(title.split()), _embed_text_without(node, (key,))
    return None


def _embed_text_without(node: BaseNode, keys: Sequence[str]) -> str:
    """The embedded text without some metadata."""
    copy = node.model_copy(deep=True)
    copy.excluded_embed_metadata_keys = [*copy.excluded_embed_metadata_keys, *keys]
    return embed_text(copy)


def _opening_title(node: BaseNode) -> tuple[str, str] | None:
    """(title, embedded text without it), where the text opens with one, or None."""
    body = node.get_content(metadata_mode=MetadataMode.NONE)
    title, rest = _split_title(body)
    return (title, embed_text(node).replace(body, rest, 1)) if title and len(rest.split()) >= 3 else None


def _split_title(body: str) -> tuple[str, str]:
    """(the heading, the line set apart or the question that opens a text, the rest); without one ("", the text)."""
    if match := next(filter(None, (heading.match(body) for heading in _HEADINGS)), None):
        title, opening = match["heading"], match[0]
    elif line := _line_set_apart(body):
        title = opening = line
    else:
        sentences = split_sentences(body)
        if len(sentences) < 2 or not sentences[0].endswith(("?", "？")):
            return "", body
        title = opening = sentences[0]
    return " ".join(title.split()), body.replace(opening, "", 1).strip()


def _line_set_apart(body: str) -> str | None:
    """A first line that is a title: short, without a sentence's punctuation, and not of a wrapped paragraph."""
    line, newline, rest = body.lstrip().partition("\n")
    line, words = line.strip(), len(line.split())
    if (
        not newline
        or _METADATA_LINE.match(line)
        or not 1 <= words <= _LINE_WORDS
        or line[-1] in ".!?:;,。！？"
        or not any(map(str.isalpha, line))
    ):
        return None
    # the lines of a wrapped paragraph are about as long as its first one
    longest = max(map(len, rest.splitlines()), default=0)
    return None if rest.lstrip()[:1].islower() or len(line) > 0.7 * longest or len(rest.split()) < 2 * words else line


class LeadQueryGenerator(NodeQueryGenerator):
    """A node's first sentence becomes the query for the rest, because texts open with what they are about.

    On the documents of medquad_test it gained more on human-written queries than a sentence drawn at random, on those
    of cisi and cacm less (benchmarks/README.md, "Training without labels").
    """

    min_words: AtLeast1 = 4
    """Shorter sentences are not used."""
    max_words: AtLeast1 = 40
    """Of a longer sentence, or of text without sentences, this many words are the query."""
    name: ClassVar[str] = LEAD

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield one query for each node with at least ten more words; the seed has no effect."""
        for node in nodes:
            _, body = _split_title(node.get_content(metadata_mode=MetadataMode.NONE))
            first = next(iter(split_sentences(body)), "")
            match = re.match(rf"(?:\S+\s+){{0,{self.max_words - 1}}}\S+", first)
            lead = match[0] if match else ""
            rest = body.replace(lead, "", 1).strip()
            if len(lead.split()) >= self.min_words and len(rest.split()) >= _FEWEST_LEFT:
                passage = embed_text(node).replace(lead, "", 1).strip()
                yield GeneratedQuery(" ".join(lead.split()), node.node_id, self.name, passage)


class DefinitionQueryGenerator(NodeQueryGenerator):
    """What a node defines in one of its first sentences becomes two queries: the term, and "what is" the term.

    English only ("X is a ...", "X refers to ..."); other languages get no queries.
    """

    max_words: AtLeast1 = 8
    """Longer terms are not used."""
    name: ClassVar[str] = DEFINITION

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield two queries for each node with a definition; the seed has no effect."""
        for node in nodes:
            _, body = _split_title(node.get_content(metadata_mode=MetadataMode.NONE))
            for sentence in split_sentences(body)[:_SENTENCES_TO_DEFINE]:
                match = _DEFINITION.match(sentence)
                term = re.sub(r"^(?:An?|The)\s", "", " ".join(match["term"].split())) if match else ""
                if 0 < len(term.split()) <= self.max_words and not _NO_TERMS.match(term):
                    yield GeneratedQuery(term, node.node_id, self.name)
                    yield GeneratedQuery(f"what is {term}", node.node_id, self.name)
                    break


class InverseClozeQueryGenerator(NodeQueryGenerator):
    """Inverse cloze: a sentence becomes the query, its node without the sentence the passage.

    Lee, Chang and Toutanova, "Latent Retrieval for Weakly Supervised Open Domain Question Answering" (ACL 2019),
    section 4. As there, one passage in ten keeps the sentence, which teaches the model that matching words matter.
    """

    per_node: AtLeast1 = 1
    """Queries for each node, as far as it has sentences."""
    keep_rate: Share = 0.1
    """Share of passages that keep the sentence."""
    min_words: AtLeast1 = 4
    """Shorter sentences are not used."""
    max_words: AtLeast1 = 40
    """Longer sentences are cut to this many words."""
    name: ClassVar[str] = INVERSE_CLOZE

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield up to `per_node` queries for each node with two sentences or more."""
        for node in nodes:
            sentences = split_sentences(node.get_content(metadata_mode=MetadataMode.NONE))
            usable = [s for s in sentences if len(s.split()) >= self.min_words]
            if len(sentences) < 2 or not usable:
                continue
            text = embed_text(node)
            # seeded by node, so that a node's queries do not depend on the other nodes
            rng = random.Random(f"{seed}:{node.node_id}")
            for sentence in rng.sample(usable, min(self.per_node, len(usable))):
                keep = rng.random() < self.keep_rate
                passage = text if keep else text.replace(sentence, "", 1).strip()
                query = " ".join(sentence.split()[: self.max_words])
                yield GeneratedQuery(query, node.node_id, self.name, passage)


class NeighbourQueryGenerator(NodeQueryGenerator):
    """Adjacent chunks: a chunk is the query, and the chunks that follow it in its document are graded answers.

    They teach which passages belong together. No user types a whole chunk, so combine this generator with others. Nodes
    are adjacent in the order in which they are given, within one source document.
    """

    scores: Annotated[tuple[ShareAbove0, ...], Field(min_length=1)] = (0.9, 0.7)
    """Grade of the next chunk, of the next but one, and so on."""
    name: ClassVar[str] = NEIGHBOUR

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield up to `len(scores)` queries from each node that another one follows; the seed has no effect."""
        by_document: dict[str, list[BaseNode]] = defaultdict(list)
        for node in nodes:
            if node.ref_doc_id is not None and node.get_content(metadata_mode=MetadataMode.NONE).strip():
                by_document[node.ref_doc_id].append(node)
        for chunks in by_document.values():
            for position, chunk in enumerate(chunks):
                query = embed_text(chunk)
                for score, answer in zip(self.scores, chunks[position + 1 :], strict=False):
                    yield GeneratedQuery(query, answer.node_id, self.name, score=score)


class MetadataQueryGenerator(NodeQueryGenerator):
    """Queries that nodes carry in their metadata.

    They come from query generators in an `IngestionPipeline` and from LlamaIndex's `QuestionsAnsweredExtractor`. The
    text of the latter is embedded together with its node; its queries are trained against the node without it, because
    the model would otherwise only learn to find the query itself.
    """

    keys: tuple[str, ...] = ("questions_this_excerpt_can_answer",)
    """Metadata keys that hold queries as text, one per line."""
    name: ClassVar[str] = METADATA

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield the queries, those of a pipeline under the names of their generators; the seed has no effect."""
        for node in nodes:
            yield from attached_queries(node)
            texts = [text for key in self.keys if isinstance(text := node.metadata.get(key), str)]
            passage = _embed_text_without(node, self.keys) if texts else None
            for text in texts:
                for query in parse_queries(text):
                    yield GeneratedQuery(query.text, node.node_id, self.name, passage)
