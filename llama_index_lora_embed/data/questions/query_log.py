"""Query logs and other human-written pairs: as a dataset of their own, or as queries for nodes.

`readers.query_logs` reads the sources.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from llama_index.core.bridge.pydantic import PrivateAttr, field_serializer
from llama_index.core.schema import BaseNode, MetadataMode
from pydantic import computed_field  # LlamaIndex's bridge lacks it

from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.errors import ConfigError, warn_user
from llama_index_lora_embed.core.files import absolute
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.origins import HUMAN
from llama_index_lora_embed.data.questions.base import GeneratedQuery, NodeQueryGenerator, embed_text
from llama_index_lora_embed.data.readers.files import PairsReport
from llama_index_lora_embed.data.readers.query_logs import Pair, nothing_usable, read_pairs
from llama_index_lora_embed.data.readers.sampling import HashSample, digest
from llama_index_lora_embed.data.text import normalise

_SHINGLE = 5  # words; shorter passages match by equality only, because many texts contain them by chance
_MAX_CANDIDATES = 100  # texts that share a shingle; more is boilerplate, and comparing them all takes too long

_Passage = tuple[str, str | None, str | None]  # text, id, source document


def dataset_from_pairs(
    source: Any,
    *,
    columns: Mapping[str, str | None] | None = None,
    split: str = "train",
    origin: str = HUMAN,
    max_queries: int | None = None,
    other_passages: int = 0,
) -> tuple[EmbeddingQAFinetuneDataset, PairsReport]:
    """Make a dataset from pairs alone. A pair with a label of 0 becomes a hard negative of its query.

    Queries with the same wording (ignoring case and spaces) are merged, and so are passages with the same text.
    Passages keep the ids of the source; other passages and all queries are named by a hash of their text, so that the
    same file always gives the same ids. Two texts under one id count as chunks of one document: the id of the second
    gets a hash appended. The corpus holds only the passages of the source, which is enough for training but makes
    retrieval look easier than it is in a whole index.

    A source that is too large for memory can be read as a sample: of `max_queries` queries with all of their passages,
    and of `other_passages` passages of other rows. Queries and passages are drawn by a hash of their text, so that the
    sample is the same in any order of the rows and in any process. Memory grows with the sample alone, unless the
    source is an iterator.

    Args:
        source: As `columns` and `split`, that of `read_pairs`.
        columns: See there.
        split: See there.
        origin: What all queries get in `query_origins`.
        max_queries: Queries to draw; None takes all.
        other_passages: Passages to draw, beside those of these queries.

    Returns:
        The dataset and the report. A passage that is labelled both 0 and above 0 for the same query is an answer.

    Raises:
        ConfigError: See `read_pairs`; or `max_queries` is below 1, or `other_passages` below 0.
        DatasetError: The source cannot be read, or it has no query with a passage that answers it.
    """
    if not (max_queries is None or is_int(max_queries, 1)) or not is_int(other_passages, 0):
        raise ConfigError(
            f"max_queries={max_queries!r}, other_passages={other_passages!r}",
            "a whole number of at least 1 or None, and one of at least 0",
            "Leave both out to read everything.",
        )
    found, report = read_pairs(source, columns, split)
    builder = _DatasetBuilder()
    if max_queries is not None:
        found = _sampled(found, max_queries, other_passages, builder, report)
    for where, pair in found:
        builder.add(pair, where, report)
    dataset = builder.build(origin, report)
    if not dataset.queries:
        raise nothing_usable(report)
    report.pairs = sum(map(len, dataset.relevant_docs.values()))
    report.negatives = sum(map(len, (dataset.hard_negatives or {}).values()))
    return dataset.check("pairs"), report


def _sampled(
    found: Iterator[tuple[str, Pair]],
    max_queries: int,
    other_passages: int,
    builder: _DatasetBuilder,
    report: PairsReport,
) -> Iterator[tuple[str, Pair]]:
    """The pairs of a sample of the queries; passages of others go into the corpus after these."""
    pairs, passages = HashSample[Pair](max_queries), HashSample[_Passage](other_passages)
    count = 0
    for where, pair in found:
        if pairs.add(normalise(pair.query), pair, where):
            report.skip("same pair twice", where)
        else:
            count += 1
        if pair.passage is not None:
            passages.add(normalise(pair.passage), (pair.passage, pair.node_id, pair.source_document))
    for entry in pairs:
        count -= 1
        yield entry
    for _, passage in passages:
        builder.add_passage(*passage)
    report.skipped.update({"pair of a query that was not drawn": count} if count else {})


class QueryLogGenerator(NodeQueryGenerator):
    """The queries of a query log, or of labelled pairs, for the nodes that answer them.

    A pair belongs to the node with its `node_id`; else to the node with its passage's text (ignoring case and spaces,
    with or without the metadata that indexing embeds); else to the only node whose text contains the passage or is
    contained in it, from five words on. Pairs that match no node, or several, are skipped and counted in a warning.
    Pairs with a label of 0 and negative passages are skipped too.

    In a pipeline with workers each worker knows only its share of the nodes, and warns about the pairs of the others.
    """

    source: Any
    """See `read_pairs`. A path is made absolute, and an iterator is read at once."""
    columns: dict[str, str | None] | None = None
    """See `read_pairs`."""
    split: str = "train"
    """See `read_pairs`."""
    name: ClassVar[str] = HUMAN

    _report: PairsReport | None = PrivateAttr(default=None)

    def __init__(
        self, source: Any, *, columns: Mapping[str, str | None] | None = None, split: str = "train", **kwargs: Any
    ) -> None:
        if isinstance(source, (str, os.PathLike)):
            source = absolute(source)  # workers in another working directory find the same file
        elif isinstance(source, Iterator):
            source = list(source)  # so that `generate` can be called twice
        kwargs.pop("pairs_sha256", None)  # `to_dict` adds it
        super().__init__(**{"source": source, "columns": columns, "split": split, **kwargs})

    @field_serializer("source")
    def _path(self, source: Any) -> str | None:
        return source if isinstance(source, str) else None

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def pairs_sha256(self) -> str:
        """Digest of all pairs; part of `to_dict`, so that a pipeline's cache tells sources apart."""
        digest = hashlib.sha256()
        for _, pair in read_pairs(self.source, self.columns, self.split)[0]:
            digest.update(repr(pair).encode())
        return digest.hexdigest()

    @property
    def report(self) -> PairsReport | None:
        """The rows used and skipped; None until all queries of a `generate` have been consumed."""
        return self._report

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield the queries in the order of the source; the seed has no effect."""
        found, report = read_pairs(self.source, self.columns, self.split)
        pairs = list(found)
        node_ids = {node.node_id for node in nodes}
        texts = {normalise(pair.passage) for _, pair in pairs if pair.passage and pair.node_id not in node_ids}
        matches = _matches(texts, nodes)
        unmatched = 0
        for where, pair in pairs:
            if pair.score == 0:
                report.skip("label of 0")
                continue
            known = pair.node_id in node_ids
            matching = [pair.node_id] if known else [*matches.get(normalise(pair.passage or ""), ())]
            if len(matching) == 1:
                report.pairs += 1
                yield GeneratedQuery(pair.query, str(matching[0]), self.name, score=pair.score)
            else:
                unmatched += 1
                report.skip("passage matches several nodes" if matching else "passage matches no node", where)
        self._report = report
        if unmatched:
            warn_user(
                f"{unmatched} of {report.pairs + unmatched} pair(s) match no node, or several, and were skipped. "
                "Pass the nodes that the pairs were made from, or train on the pairs' own passages with "
                "dataset_from_pairs(source)."
            )


class _DatasetBuilder:
    """Collects pairs and merges equal queries and passages."""

    def __init__(self) -> None:
        self.queries: dict[str, str] = {}
        self.corpus: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.scores: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self.negatives: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self.ids_by_text: dict[str, str] = {}
        self.seen: set[tuple[str, str, bool]] = set()

    def add(self, pair: Pair, where: str, report: PairsReport) -> None:
        if pair.passage is None:
            report.skip(
                "row without passage", where, f"only the id {pair.node_id!r}; QueryLogGenerator finds it among nodes"
            )
            return
        query_id = digest(normalise(pair.query))
        self.queries.setdefault(query_id, pair.query)
        passage_id = self.add_passage(pair.passage, pair.node_id, pair.source_document)
        for text in pair.negatives:
            self.negatives[query_id].setdefault(self.add_passage(text))
        if (query_id, passage_id, pair.score > 0) in self.seen:
            report.skip("same pair twice", where)
        self.seen.add((query_id, passage_id, pair.score > 0))
        if pair.score > 0:
            scores = self.scores[query_id]
            scores[passage_id] = max(pair.score, scores.get(passage_id, 0.0))
        else:
            self.negatives[query_id].setdefault(passage_id)

    def add_passage(self, text: str, given: str | None = None, source: str | None = None) -> str:
        """Put a passage into the corpus, unless its text is there; returns its id."""
        key = normalise(text)
        passage_id = self.ids_by_text.get(key)
        if passage_id is None:
            passage_id = given or digest(key)
            if passage_id in self.corpus:  # the id of a document, whose chunks stay together
                source, passage_id = source or passage_id, f"{passage_id}-{digest(key)}"
            self.ids_by_text[key] = passage_id
            self.corpus[passage_id] = text
        if source:
            self.sources.setdefault(passage_id, source)
        return passage_id

    def build(self, origin: str, report: PairsReport) -> EmbeddingQAFinetuneDataset:
        queries = {i: text for i, text in self.queries.items() if self.scores.get(i)}
        negatives = {i: [p for p in self.negatives.get(i, ()) if p not in self.scores[i]] for i in queries}
        graded = {i: {p: score for p, score in self.scores[i].items() if score != 1} for i in queries}
        counts = {
            "query with only negatives": len(self.queries) - len(queries),
            "negative that is an answer too": sum(len(self.negatives.get(i, ())) - len(negatives[i]) for i in queries),
        }
        report.skipped.update({reason: count for reason, count in counts.items() if count})
        return EmbeddingQAFinetuneDataset(
            queries=queries,
            corpus=self.corpus,
            relevant_docs={i: list(self.scores[i]) for i in queries},
            source_documents=self.sources or None,
            query_origins=dict.fromkeys(queries, origin),
            hard_negatives={i: ids for i, ids in negatives.items() if ids} or None,
            relevance_scores={i: scores for i, scores in graded.items() if scores} or None,
        )


def _matches(passages: set[str], nodes: Sequence[BaseNode]) -> dict[str, set[str]]:
    """Normalised passages to the ids of the nodes that match: the one with the same text, or all that overlap."""
    equal: dict[str, str] = {}  # of several nodes with the same text, the first one
    bodies: dict[str, str] = {}
    for node in nodes:
        body = normalise(node.get_content(metadata_mode=MetadataMode.NONE))
        bodies.setdefault(body, node.node_id)
        for text in (normalise(embed_text(node)), body):
            equal.setdefault(text, node.node_id)
    found = {passage: {equal[passage]} if passage in equal else set() for passage in passages}
    unmatched = [passage for passage, ids in found.items() if not ids]
    for passage, body in _contained(unmatched, bodies):
        found[passage].add(bodies[body])
    for body, passage in _contained(bodies, unmatched):
        found[passage].add(bodies[body])
    return found


def _contained(texts: Collection[str], containers: Collection[str]) -> Iterator[tuple[str, str]]:
    """All (text, container) where the container has the text's words in it.

    Each text is indexed by one shingle from its middle, because boilerplate is at the edges; a container of the text
    has that shingle too. The cost is one look-up for each word, whatever the number of texts.
    """
    index: defaultdict[int, list[str]] = defaultdict(list)
    for text in texts if containers else ():
        if shingles := _shingles(text):
            index[shingles[len(shingles) // 2]].append(text)
    for container in containers:
        for shingle in _shingles(container):
            candidates = index.get(shingle, ())
            for text in candidates if len(candidates) <= _MAX_CANDIDATES else ():
                if f" {text} " in f" {container} ":
                    yield text, container


def _shingles(text: str) -> list[int]:
    """A hash for each run of `_SHINGLE` words."""
    words = text.split()
    return [hash(run) for run in zip(*(words[start:] for start in range(_SHINGLE)), strict=False)]
