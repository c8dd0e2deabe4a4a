"""Which passages are false negatives of a query, mined or in a batch, and for what reason."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.text import normalise
from llama_index_lora_embed.training.negatives.document_texts import DocumentTexts

DUPLICATE = "same text as a positive"
WORDING = "answers a query of the same wording"
NEAR_DUPLICATE = "near-duplicate of a positive"
SIBLING = "sibling of a positive"
OVERLAP = "overlaps a positive or contains the query"
MARGIN = "as close as the positive, or within its margin"
MAX_SCORE = "above max_score"
RANGE_MIN = "among the first range_min"
REPEATED = "same text as a closer negative"

_OVERLAP_CHARACTERS = 50  # overlapping chunks share sentences; this many equal characters are no coincidence
_GUARDS_KEPT = 4096
# a batch compares each of its passages with each of its queries
_normalised = lru_cache(maxsize=1 << 13)(normalise)


class _Itself(dict[str, str]):
    """Id to id; a missing id maps to itself, as most passages of a large corpus do."""

    def __missing__(self, key: str) -> str:
        return key


class _Alone(dict[str, list[str]]):
    """Document id to its passages; a passage without a document is a document of its own."""

    def __missing__(self, key: str) -> list[str]:
        return [key]


class Corpus:
    """Which passages share a text, nearly a text, or a document. Nothing is stored for passages that share nothing.

    Attributes:
        dataset: Dataset with the corpus.
        distinct: The first id of each text; only these are encoded and searched.
        first: Passage id to the first id with exactly its text.
        alike: Passage id to the first id with its text, ignoring case and spaces.
        near: Passage id to an id that all passages with nearly its text have in common.
        elsewhere: First id, as in `alike`, to all documents that contain its text, if there are several.
        documents: Document id to its passages, in the order of the corpus.
        place: Passage id to its position in its document.
        texts: Number of different texts, ignoring case and spaces.
    """

    def __init__(self, dataset: EmbeddingQAFinetuneDataset, near_duplicates: Mapping[str, str]) -> None:
        if unknown := sorted({*near_duplicates.keys(), *near_duplicates.values()} - dataset.corpus.keys()):
            raise ConfigError(
                f"near_duplicates with {len(unknown)} ids that are not in the corpus",
                "ids of the dataset's corpus",
                "Pass dataset.near_duplicates(), or nothing.",
                unknown,
            )
        self.dataset = dataset
        self.first, self.alike, self.near = _Itself(), _Itself(), _Itself()
        self.elsewhere: dict[str, set[str]] = {}
        self.documents = _Alone()
        exact: dict[str, str] = {}
        normal: dict[bytes, str] = {}
        for passage_id, text in dataset.corpus.items():
            source = dataset.source_of(passage_id)
            if (same := exact.setdefault(text, passage_id)) != passage_id:
                self.first[passage_id] = same
            if (head := normal.setdefault(_digest(normalise(text)), passage_id)) != passage_id:
                self.alike[passage_id] = head
                if source != dataset.source_of(head) or head in self.elsewhere:
                    self.elsewhere.setdefault(head, {dataset.source_of(head)}).add(source)
            if dataset.source_documents:
                self.documents.setdefault(source, []).append(passage_id)
        self.distinct, self.texts = list(exact.values()), len(normal)
        self.place = {i: at for ids in self.documents.values() for at, i in enumerate(ids)}
        pairs = ((self.alike[i], self.alike[root]) for i, root in near_duplicates.items())
        roots = {head: root for head, root in pairs if head != root}
        for passage_id in dataset.corpus:
            if (root := roots.get(self.alike[passage_id], self.alike[passage_id])) != passage_id:
                self.near[passage_id] = root

    def around(self, document: str, passage_ids: Iterable[str], window: int) -> list[str]:
        """A document's passages within `window` positions of the given ones, those included."""
        passages, places = self.documents[document], (self.place.get(i, 0) for i in passage_ids)
        return [i for at in places for i in passages[max(0, at - window) : at + window + 1]]

    def homes(self, passage_id: str) -> set[str]:
        """The documents that contain the passage's text."""
        head = self.alike[passage_id]
        return self.elsewhere.get(head) or {self.dataset.source_of(head)}


class Guard:
    """Excludes passages as negatives of all queries of one (normalised) wording, whatever their similarity.

    `positives` are the ids of the passages that answer any of these queries; `window` is the `sibling_window`.
    """

    def __init__(self, corpus: Corpus, wording: str, positives: set[str], window: int | None) -> None:
        self.corpus = corpus
        self.wording = wording
        self.window = window
        self.by_document: dict[str, list[str]] = {}
        for passage_id in positives:
            self.by_document.setdefault(corpus.dataset.source_of(passage_id), []).append(passage_id)
        self.answers = {corpus.alike[i] for i in positives}
        self.near = {corpus.near[i] for i in positives}
        near = (i for document, ids in self.by_document.items() for i in corpus.around(document, ids, window or 0))
        self.siblings = {corpus.alike[i] for i in near}

    def reason(self, passage_id: str, own: set[str]) -> str | None:
        """Why a passage is excluded; None if it is not. `own`: the query's own positives, as in `Corpus.alike`."""
        alike = self.corpus.alike[passage_id]
        if alike in self.answers:
            return DUPLICATE if alike in own else WORDING
        if self.corpus.near[passage_id] in self.near:
            return NEAR_DUPLICATE
        if alike in self.siblings or (self.window is None and self.shared_documents(passage_id)):
            return SIBLING
        return OVERLAP if self.overlaps(passage_id) else None

    def shared_documents(self, passage_id: str) -> set[str]:
        """The positives' documents that contain the passage's text."""
        return self.corpus.homes(passage_id) & self.by_document.keys()

    def overlaps(self, passage_id: str) -> bool:
        """Whether a passage of a positive's document overlaps the positive, or contains the query word for word.

        Only the end of one text is looked up in the other: the end of a chunk is the beginning of the next, while
        beginnings are equal throughout a document where indexing puts its title or metadata first.
        """
        if not (shared := self.shared_documents(passage_id)):
            return False
        text = _normalised(self.corpus.dataset.corpus[passage_id])
        others = (_normalised(self.corpus.dataset.corpus[i]) for document in shared for i in self.by_document[document])
        return self.wording in text or any(
            text[-_OVERLAP_CHARACTERS:] in other or other[-_OVERLAP_CHARACTERS:] in text for other in others
        )


@dataclass
class Positions:
    """A batch's passages (a node can have several), and their positions by what they share with others."""

    passage_ids: Sequence[str]
    near: dict[str, list[int]] = field(default_factory=dict)
    alike: dict[str, list[int]] = field(default_factory=dict)
    documents: dict[str, list[int]] = field(default_factory=dict)


class FalseNegatives:
    """Finds passages that are no true negatives of a query although they are not labelled as relevant.

    These are passages that answer the query or one of the same wording, have the same or nearly the same text as such a
    passage, are its neighbors in the same document, overlap it, or contain the query.

    Args:
        dataset: Checked dataset.
        window: `ObjectiveSettings.sibling_window`.
        near_duplicates: Passage id to the first id with nearly its text; None compares only whether texts are equal,
            ignoring case and spaces.

    Raises:
        ConfigError: `near_duplicates` has ids that are not in the corpus.
    """

    def __init__(
        self,
        dataset: EmbeddingQAFinetuneDataset,
        window: int | None,
        near_duplicates: Mapping[str, str] | None = None,
    ) -> None:
        self.corpus = Corpus(dataset, near_duplicates or {})
        self.window = window
        # positives by wording, which several queries can have, because several nodes can share a title
        self._positives: dict[bytes, list[str]] = {}
        for query_id, text in dataset.queries.items():
            self._positives.setdefault(_digest(normalise(text)), []).extend(dataset.relevant_docs[query_id])
        self._guards: dict[str, Guard] = {}

    def guard(self, query_id: str) -> Guard:
        """Guard of the query's wording."""
        wording = _normalised(self.corpus.dataset.queries[query_id])
        if wording not in self._guards:
            if len(self._guards) >= _GUARDS_KEPT:
                self._guards.clear()
            positives = set(self._positives[_digest(wording)])
            self._guards[wording] = Guard(self.corpus, wording, positives, self.window)
        return self._guards[wording]

    def index(self, passage_ids: Sequence[str]) -> Positions:
        """Index the passages of a batch once for all of its queries."""
        positions = Positions(passage_ids)
        for at, passage_id in enumerate(passage_ids):
            positions.alike.setdefault(self.corpus.alike[passage_id], []).append(at)
            positions.near.setdefault(self.corpus.near[passage_id], []).append(at)
            for document in self.corpus.homes(passage_id):
                positions.documents.setdefault(document, []).append(at)
        return positions

    def among(self, query_id: str, positions: Positions) -> set[int]:
        """Positions of the passages that are no negatives of the query, its own positives included."""
        guard = self.guard(query_id)
        found = {at for key in positions.near.keys() & guard.near for at in positions.near[key]}
        found.update(at for key in positions.alike.keys() & guard.siblings for at in positions.alike[key])
        shared = positions.documents.keys() & guard.by_document.keys()
        others = {at for document in shared for at in positions.documents[document]} - found
        # a batch rarely has more than two of them, so texts are hardly ever compared
        return found | {at for at in others if self.window is None or guard.overlaps(positions.passage_ids[at])}

    def excludes(self, query_id: str, passage_id: str) -> bool:
        """Whether a passage is no negative of the query."""
        return bool(self.among(query_id, self.index([passage_id])))

    def excluded_columns(self, query_ids: Iterable[str], passage_ids: Sequence[str]) -> list[frozenset[int]]:
        """For each query the positions of the passages that `excludes` holds for, its own positives included.

        For a whole corpus: what `among` finds, without comparing each query with each passage of a document.
        """
        positions = self.index(passage_ids)
        documents: dict[str, DocumentTexts] = {}
        found: dict[str, frozenset[int]] = {}
        columns = []
        for query_id in query_ids:
            guard = self.guard(query_id)
            if guard.wording not in found:
                found[guard.wording] = frozenset(self._excluded(guard, positions, documents))
            columns.append(found[guard.wording])
        return columns

    def _excluded(self, guard: Guard, positions: Positions, documents: dict[str, DocumentTexts]) -> set[int]:
        texts = self.corpus.dataset.corpus
        found = {at for key in guard.near for at in positions.near.get(key, ())}
        found.update(at for key in guard.siblings for at in positions.alike.get(key, ()))
        for document, positives in guard.by_document.items():
            columns = positions.documents.get(document, [])
            if self.window is None:
                found.update(columns)
            elif not found.issuperset(columns):
                if document not in documents:
                    passages = (texts[positions.passage_ids[at]] for at in columns)
                    documents[document] = DocumentTexts([*map(normalise, passages)], _OVERLAP_CHARACTERS)
                others = documents[document].containing(guard.wording)
                others.update(*(documents[document].overlapping(_normalised(texts[i])) for i in positives))
                found.update(columns[number] for number in others)
        return found

    def blocked(self, query_id: str) -> Iterable[tuple[str, str]]:
        """Traits, as from `traits`, of passages that are no negatives of the query.

        Overlaps are searched within two positions of a positive, not in the whole document.
        """
        guard = self.guard(query_id)
        yield from (("near", key) for key in guard.near)
        if self.window is None:
            yield from (("document", key) for key in guard.by_document)
            return
        yield from (("alike", key) for key in guard.siblings)
        if self.window < 2:
            for document, ids in guard.by_document.items():
                for passage_id in dict.fromkeys(self.corpus.around(document, ids, 2)):
                    if guard.overlaps(passage_id):
                        yield "alike", self.corpus.alike[passage_id]

    def traits(self, passage_id: str) -> Iterable[tuple[str, str]]:
        """Traits of a passage: its text, nearly its text, and where whole documents are excluded, its documents."""
        alike = self.corpus.alike[passage_id]
        yield "near", self.corpus.near[passage_id]
        yield "alike", alike
        if self.window is None:
            yield from (("document", key) for key in self.corpus.homes(passage_id))


def _digest(text: str) -> bytes:
    """Key for a text in a dictionary, in fewer bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def too_close(score: float, positive: float, settings: MiningSettings) -> str | None:
    """Why a passage with this similarity is excluded; None if it is not. The margins are sentence-transformers' (6.2).

    The relative margin is a share of the magnitude of `positive`, the similarity of the positive.
    """
    if settings.absolute_margin is not None and score + settings.absolute_margin > positive:
        return MARGIN
    if settings.relative_margin is not None and score > positive - abs(positive) * settings.relative_margin:
        return MARGIN
    return MAX_SCORE if settings.max_score is not None and score > settings.max_score else None
