"""What may not become a negative, mined or met in a batch, and why."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset, normalise

DUPLICATE = "same text as a positive"
WORDING = "answers a question of the same wording"
NEAR_DUPLICATE = "near-duplicate of a positive"
SIBLING = "sibling of a positive"
OVERLAP = "overlaps a positive or holds the question"
MARGIN = "as close as the positive, or within its margin"
MAX_SCORE = "above max_score"
RANGE_MIN = "among the first range_min"
REPEATED = "same text as a closer passage"

# Chunks that overlap share whole sentences; this many characters are no coincidence.
_OVERLAP_CHARACTERS = 50
_GUARDS_KEPT = 4096
# one batch compares each of its passages with each of its questions
_normalised = lru_cache(maxsize=1 << 13)(normalise)


class _Itself(dict[str, str]):
    """Ids to ids; one that is not there leads to itself, which most passages of a large corpus do."""

    def __missing__(self, key: str) -> str:
        return key


class _Alone(dict[str, list[str]]):
    """Document id to its passages; without documents, each passage is its own."""

    def __missing__(self, key: str) -> list[str]:
        return [key]


@dataclass(frozen=True)
class Corpus:
    """What is known of the passages without a model. Of the many passages that share nothing, nothing is held.

    Attributes:
        dataset: Whose corpus it is.
        distinct: The first id of each text; only these are encoded and searched.
        first: Passage id to the first id with exactly its text.
        alike: Passage id to the first id with its text but for case and spaces.
        near: Passage id to an id that all passages with nearly its text have in common.
        elsewhere: First id, as in `alike`, to all documents in which its text stands, if these are several.
        documents: Document id to its passages, in the order of the corpus.
        place: Passage id to its position in its document.
        texts: How many texts there are, but for case and spaces.
    """

    dataset: EmbeddingQAFinetuneDataset
    distinct: list[str]
    first: dict[str, str]
    alike: dict[str, str]
    near: dict[str, str]
    elsewhere: dict[str, set[str]]
    documents: dict[str, list[str]]
    place: dict[str, int]
    texts: int

    @classmethod
    def of(cls, dataset: EmbeddingQAFinetuneDataset, near_duplicates: Mapping[str, str]) -> Corpus:
        """Of a dataset; `near_duplicates` leads from passages to the first with nearly the same text.

        Raises:
            ConfigError: `near_duplicates` names other passages.
        """
        if unknown := sorted({*near_duplicates.keys(), *near_duplicates.values()} - dataset.corpus.keys()):
            raise ConfigError(
                f"near_duplicates with {len(unknown)} passage(s) that are not in the corpus",
                "ids of the dataset's own corpus",
                "Pass near_duplicate_groups(dataset.corpus), or nothing.",
                unknown,
            )
        exact: dict[str, str] = {}
        normal: dict[bytes, str] = {}
        first, alike, near = _Itself(), _Itself(), _Itself()
        elsewhere: dict[str, set[str]] = {}
        documents = _Alone()
        for passage_id, text in dataset.corpus.items():
            source = dataset.source_of(passage_id)
            if (same := exact.setdefault(text, passage_id)) != passage_id:
                first[passage_id] = same
            if (head := normal.setdefault(_digest(normalise(text)), passage_id)) != passage_id:
                alike[passage_id] = head
                if source != dataset.source_of(head) or head in elsewhere:
                    elsewhere.setdefault(head, {dataset.source_of(head)}).add(source)
            if dataset.source_documents:
                documents.setdefault(source, []).append(passage_id)
        place = {i: at for ids in documents.values() for at, i in enumerate(ids)}
        kin = {alike[i]: alike[root] for i, root in near_duplicates.items() if alike[i] != alike[root]}
        for passage_id in dataset.corpus:
            if (root := kin.get(alike[passage_id], alike[passage_id])) != passage_id:
                near[passage_id] = root
        return cls(dataset, list(exact.values()), first, alike, near, elsewhere, documents, place, len(normal))

    def around(self, document: str, passage_ids: Iterable[str], window: int) -> list[str]:
        """A document's passages up to so many places before or after these of it, and themselves."""
        passages, places = self.documents[document], (self.place.get(i, 0) for i in passage_ids)
        return [i for at in places for i in passages[max(0, at - window) : at + window + 1]]

    def homes(self, passage_id: str) -> set[str]:
        """The documents in which the passage's text stands."""
        head = self.alike[passage_id]
        return self.elsewhere.get(head) or {self.dataset.source_of(head)}


class Guard:
    """Says of questions of one wording which passages may not become their negatives, whatever the score.

    Args:
        corpus: The passages.
        question: The wording, normalised.
        positives: What answers any of these questions.
        window: `MiningSettings.sibling_window`.
    """

    def __init__(self, corpus: Corpus, question: str, positives: set[str], window: int | None) -> None:
        self.corpus = corpus
        self.question = question
        self.by_document: dict[str, list[str]] = {}
        for passage_id in positives:
            self.by_document.setdefault(corpus.dataset.source_of(passage_id), []).append(passage_id)
        self.answers = {corpus.alike[i] for i in positives}
        self.near = {corpus.near[i] for i in positives}
        self.siblings: set[str] = set()
        for document, ids in self.by_document.items():
            passages = corpus.documents[document] if window is None else corpus.around(document, ids, window)
            self.siblings |= {corpus.alike[i] for i in passages}

    def reason(self, passage_id: str, own: set[str]) -> str | None:
        """Why not this passage; None if nothing is against it. `own`: the question's own positives, `alike`."""
        alike = self.corpus.alike[passage_id]
        if alike in self.answers:
            return DUPLICATE if alike in own else WORDING
        if self.corpus.near[passage_id] in self.near:
            return NEAR_DUPLICATE
        if alike in self.siblings:
            return SIBLING
        return OVERLAP if self.overlaps(passage_id) else None

    def overlaps(self, passage_id: str) -> bool:
        """Whether a passage of a positive's document shares its text, or holds the question word for word.

        Only ends are looked up in the other: of two chunks, the end of the one is what the other begins with,
        while beginnings are equal throughout a document where indexing puts its title or metadata first.
        """
        shared = self.corpus.homes(passage_id) & self.by_document.keys()
        if not shared:
            return False
        text = _normalised(self.corpus.dataset.corpus[passage_id])
        others = (_normalised(self.corpus.dataset.corpus[i]) for document in shared for i in self.by_document[document])
        return self.question in text or any(
            text[-_OVERLAP_CHARACTERS:] in other or other[-_OVERLAP_CHARACTERS:] in text for other in others
        )


@dataclass
class Places:
    """Where the passages of a batch can be met: positions by what they share with others.

    Attributes:
        passage_ids: The passages; several positions can hold one node.
        near: `Corpus.near` to positions.
        alike: `Corpus.alike` to positions.
        documents: Document id to positions.
    """

    passage_ids: Sequence[str]
    near: dict[str, list[int]] = field(default_factory=dict)
    alike: dict[str, list[int]] = field(default_factory=dict)
    documents: dict[str, list[int]] = field(default_factory=dict)


class FalseNegatives:
    """Says which passages are no negatives of a question although nobody judged them.

    These are what `Guard` says: passages that answer the question or one of the same wording, with the same or nearly
    the same text, neighbours in the same document, and chunks that overlap an answer or hold the question.

    Args:
        dataset: Checked dataset.
        window: `ObjectiveSettings.sibling_window`.
        near_duplicates: Passage id to the id that all passages with nearly its text share; None compares equal texts
            (but for case and spaces) only.

    Raises:
        ConfigError: `near_duplicates` names passages that are not in the corpus.
    """

    def __init__(
        self,
        dataset: EmbeddingQAFinetuneDataset,
        window: int | None,
        near_duplicates: Mapping[str, str] | None = None,
    ) -> None:
        self.corpus = Corpus.of(dataset, near_duplicates or {})
        self.window = window
        # answers of wordings that are asked more than once, because one title can be several nodes'
        self._answers: dict[bytes, set[str]] = {}
        asked: dict[bytes, str] = {}
        for query_id, text in dataset.queries.items():
            wording = _digest(normalise(text))
            if (before := asked.setdefault(wording, query_id)) != query_id:
                answers = self._answers.setdefault(wording, set(dataset.relevant_docs[before]))
                answers.update(dataset.relevant_docs[query_id])
        self._guards: dict[str, Guard] = {}

    def guard(self, query_id: str) -> Guard:
        """Of the question's wording. A whole document as window is left to the caller, who need not list it."""
        wording = _normalised(self.corpus.dataset.queries[query_id])
        found = self._guards.get(wording)
        if found is None:
            if len(self._guards) >= _GUARDS_KEPT:
                self._guards.clear()
            answers = self._answers.get(_digest(wording)) or set(self.corpus.dataset.relevant_docs[query_id])
            found = self._guards[wording] = Guard(self.corpus, wording, answers, self.window or 0)
        return found

    def places(self, passage_ids: Sequence[str]) -> Places:
        """Look the passages of a batch up, once for all of its questions."""
        places = Places(passage_ids)
        for at, passage_id in enumerate(passage_ids):
            alike = self.corpus.alike[passage_id]
            places.alike.setdefault(alike, []).append(at)
            places.near.setdefault(self.corpus.near[passage_id], []).append(at)
            for document in self.corpus.homes(passage_id):
                places.documents.setdefault(document, []).append(at)
        return places

    def among(self, query_id: str, places: Places) -> set[int]:
        """Positions of the passages that are no negatives of the question, its own answers included."""
        guard = self.guard(query_id)
        found = {at for key in places.near.keys() & guard.near for at in places.near[key]}
        found.update(at for key in places.alike.keys() & guard.siblings for at in places.alike[key])
        for document in places.documents.keys() & guard.by_document.keys():
            # usually none or two of the batch, so that texts are hardly ever compared
            for at in places.documents[document]:
                if at not in found and (self.window is None or guard.overlaps(places.passage_ids[at])):
                    found.add(at)
        return found

    def excludes(self, query_id: str, passage_id: str) -> bool:
        """Whether this passage is no negative of the question."""
        return bool(self.among(query_id, self.places([passage_id])))

    def blocked(self, query_id: str) -> Iterable[tuple[str, str]]:
        """What a passage must not share with the question's answers, as keys that `traits` also makes.

        Overlaps are looked for within two places of an answer, not in the whole document.
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
        """What `blocked` may name of a passage."""
        alike = self.corpus.alike[passage_id]
        yield "near", self.corpus.near[passage_id]
        yield "alike", alike
        if self.window is None:
            yield from (("document", key) for key in self.corpus.homes(passage_id))


def _digest(text: str) -> bytes:
    """Stands for a text in a dictionary, in fewer bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def too_close(score: float, positive: float, settings: MiningSettings) -> str | None:
    """Why not at this similarity, with the margins as sentence-transformers 6.2 draws them; None if it may be.

    The relative margin is a share of the magnitude of `positive`, the similarity of the positive.
    """
    if settings.absolute_margin is not None and score + settings.absolute_margin > positive:
        return MARGIN
    if settings.relative_margin is not None and score > positive - abs(positive) * settings.relative_margin:
        return MARGIN
    return MAX_SCORE if settings.max_score is not None and score > settings.max_score else None
