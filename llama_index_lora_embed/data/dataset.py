"""The dataset: queries, passages, and which answers which. Its JSON file is a public format."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, PrivateAttr, ValidationError, field_validator

from llama_index_lora_embed.config import NEAR_DUPLICATE
from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.core.files import write_json
from llama_index_lora_embed.data.near_duplicates import Sketches, near_duplicate_groups
from llama_index_lora_embed.data.origins import UNKNOWN, origin_name
from llama_index_lora_embed.data.text import normalise


class EmbeddingQAFinetuneDataset(BaseModel):
    """Queries and the passages that answer them.

    The first four fields, and the JSON file of `save_json`, are those of llama-index-finetuning's class of
    the same name; each reads the other's files. The rest is optional and ignored by older readers.

    Attributes:
        queries: Query id to text.
        corpus: Passage id to text, as indexing embeds it (`MetadataMode.EMBED`).
        relevant_docs: Query id to the ids of the passages that answer it.
        mode: Always "text"; kept for older readers.
        source_documents: Passage id to the id of the document that it is a chunk of; splits keep these together.
        query_origins: Query id to how the query came about ("title", "inverse_cloze", "human", ...; `data.origins`).
        training_passages: Query id to the text that it is trained against where that differs from the corpus
            (inverse cloze leaves the sentence out). Retrieval is always evaluated on the corpus.
        hard_negatives: Query id to the ids of passages that look relevant and are not.
        relevance_scores: Query id to passage id to a grade above 0 and at most 1; 1 where there is none. Training
            weights the query's loss by it.
        judged_irrelevant: Query id to the ids of passages that were judged and do not answer it. Where the dataset has
            this field, all other passages outside `relevant_docs` are unjudged, and evaluations report them.

    Raises:
        DatasetError: A field has the wrong type; every place is named.
    """

    kind: ClassVar[Literal["queries"]] = "queries"
    queries: dict[str, str]
    corpus: dict[str, str]
    relevant_docs: dict[str, list[str]]
    mode: str = "text"
    source_documents: dict[str, str] | None = None
    query_origins: dict[str, str] | None = None
    training_passages: dict[str, str] | None = None
    hard_negatives: dict[str, list[str]] | None = None
    relevance_scores: dict[str, dict[str, float]] | None = None
    judged_irrelevant: dict[str, list[str]] | None = None

    _sketches: Sketches = PrivateAttr(default_factory=Sketches)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}, got {item['input']!r:.80}"
                for item in error.errors()
            ]
            raise DatasetError(
                f"{len(problems)} value(s) of the wrong type",
                "queries and corpus as {id: text}, relevant_docs as {query id: [passage id, ...]}",
                "Correct these entries:",
                problems,
            ) from error

    @field_validator("query_origins")
    @classmethod
    def _known_origins(cls, origins: dict[str, str] | None) -> dict[str, str] | None:
        return origins and {i: origin_name(origin) for i, origin in origins.items()}

    @property
    def query_docid_pairs(self) -> list[tuple[str, list[str]]]:
        """(query text, ids of its relevant passages), in the order of `queries`."""
        return [(query, self.relevant_docs[query_id]) for query_id, query in self.queries.items()]

    @classmethod
    def coerce(cls, dataset: Any, name: str = "dataset") -> EmbeddingQAFinetuneDataset:
        """This class from itself, from llama-index-finetuning's, from a mapping or from a path to its JSON.

        Raises:
            DatasetError: It is none of these.
        """
        if isinstance(dataset, cls):
            return dataset
        if isinstance(dataset, (str, os.PathLike)):
            return cls.from_json(dataset)
        if isinstance(dataset, Mapping):
            return cls(**{str(key): value for key, value in dataset.items()})
        if all(hasattr(dataset, field) for field in ("queries", "corpus", "relevant_docs")):
            return cls(**{field: getattr(dataset, field) for field in cls.model_fields if hasattr(dataset, field)})
        raise DatasetError(
            f"{name} of type {type(dataset).__name__}",
            "an EmbeddingQAFinetuneDataset, a mapping with its fields, or the path of its JSON file",
            "Nodes become a dataset with LoraFinetuneEngine.from_nodes(nodes, ...).",
        )

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> EmbeddingQAFinetuneDataset:
        """Read a dataset file (UTF-8) of this package or of llama-index-finetuning.

        Raises:
            DatasetError: The file does not exist, is not JSON, or has other content.
        """
        known: dict[str, str] = {}

        def shared(value: Any) -> Any:  # json makes a new string for each value, and ids are values many times
            if isinstance(value, list):
                return [shared(item) for item in value]
            return known.setdefault(value, value) if isinstance(value, str) else value

        try:
            text = Path(path).read_text(encoding="utf-8")
            data = json.loads(
                text, object_pairs_hook=lambda pairs: {shared(key): shared(value) for key, value in pairs}
            )
            if not isinstance(data, dict):
                raise ValueError(f"a JSON object was expected, not {type(data).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise DatasetError(
                f"{str(path)!r}, which cannot be read: {error}",
                "the JSON file of a dataset",
                "Write one with dataset.save_json(path), or check the path.",
            ) from error
        return cls(**data)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the dataset; a reader sees the old file or the new one, never half of it."""
        write_json(path, self.model_dump(exclude_none=True))

    def digest(self) -> str:
        """SHA-256 (hex) over all fields; the same content gives the same digest in any order of keys."""
        digest = hashlib.sha256()
        fields = {name: value for name, value in vars(self).items() if value is not None}
        for piece in json.JSONEncoder(sort_keys=True).iterencode(fields):  # the whole text is as large as the corpus
            digest.update(piece.encode())
        return digest.hexdigest()

    def order_digest(self) -> str:
        """SHA-256 (hex) over all fields and the order of queries and passages, which decides what is in a batch."""
        text = json.dumps([self.digest(), list(self.queries), list(self.corpus)], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def origins(self) -> dict[str, int]:
        """Number of queries by origin; "unknown" where the dataset has none."""
        return dict(sorted(Counter(map(self.origin_of, self.queries)).items()))

    def origin_of(self, query_id: str) -> str:
        """How a query came about; "unknown" where that is not recorded."""
        return (self.query_origins or {}).get(query_id, UNKNOWN)

    def with_origin(self, origin: str) -> EmbeddingQAFinetuneDataset:
        """This dataset with an origin for those queries that have none recorded, such as "human"."""
        origins = {**dict.fromkeys(self.queries, origin), **(self.query_origins or {})}
        return self.model_copy(update={"query_origins": origins})

    def source_of(self, passage_id: str) -> str:
        """Id of the document that a passage comes from; its own id where none is recorded."""
        return (self.source_documents or {}).get(passage_id, passage_id)

    def problems(self, *, unanswered: bool = False) -> list[str]:
        """One line for each problem that would crash or spoil training, with its id.

        Args:
            unanswered: Whether queries may be without a relevant passage if passages were judged irrelevant to them.
        """
        found: list[str] = []
        text: Any  # fields can be changed after construction, which pydantic does not check
        trained = {"training passage of query": self.training_passages or {}}
        for what, texts in ({"query": self.queries, "passage": self.corpus} | trained).items():
            for i, text in texts.items():
                if not isinstance(text, str):
                    found.append(f"{what} {i!r} is not text: {text!r:.80}")
                elif not text.strip():
                    found.append(f"{what} {i!r} is empty")
        judged = (self.judged_irrelevant or {}) if unanswered else {}
        without = (i for i in self.queries if not self.relevant_docs.get(i) and not judged.get(i))
        found += [f"query {i!r} has no relevant passage" for i in without]
        for field in ("relevant_docs", "hard_negatives", "judged_irrelevant", "training_passages"):
            unknown = [i for i in getattr(self, field) or {} if i not in self.queries]
            found += [f"{field} names query {i!r}, which is not in queries" for i in unknown]
        for field in ("relevant_docs", "hard_negatives", "judged_irrelevant"):
            for query_id, passage_ids in (getattr(self, field) or {}).items():
                lost = [i for i in passage_ids if i not in self.corpus]
                found += [f"{field}[{query_id!r}] names passage {i!r}, which is not in corpus" for i in lost]
        for what, field in (("a hard negative of", "hard_negatives"), ("judged irrelevant to", "judged_irrelevant")):
            for query_id, negatives in (getattr(self, field) or {}).items():
                both = sorted(set(negatives) & set(self.relevant_docs.get(query_id, [])))
                found += [f"passage {i!r} is both relevant and {what} query {query_id!r}" for i in both]
        for query_id, scores in (self.relevance_scores or {}).items():
            for passage_id, score in scores.items():
                where = f"relevance_scores[{query_id!r}][{passage_id!r}]"
                if passage_id not in self.relevant_docs.get(query_id, ()):
                    found.append(f"{where}: the passage is not among the query's relevant_docs")
                elif not 0 < score <= 1:
                    found.append(f"{where} is {score!r}, expected a number above 0 and at most 1")
        return found

    def score(self, query_id: str, passage_id: str) -> float:
        """Grade of a relevant passage, above 0 and at most 1; 1 where the dataset has none."""
        return (self.relevance_scores or {}).get(query_id, {}).get(passage_id, 1.0)

    def check(self, name: str = "dataset", *, unanswered: bool = False) -> EmbeddingQAFinetuneDataset:
        """This dataset, if it is not empty and has no `problems(unanswered=unanswered)`.

        Raises:
            DatasetError: It is empty or has problems; `.problems` lists all of them.
        """
        if not self.queries or not self.corpus:
            raise DatasetError(
                f"a {name} with {len(self.queries)} queries and {len(self.corpus)} passages",
                "at least one of each",
                "Check that the nodes have text and that the query generators yielded queries.",
            )
        if problems := self.problems(unanswered=unanswered):
            raise DatasetError(
                f"a {name} with {len(problems)} problem(s)",
                "non-empty texts, and ids that exist",
                "Correct or remove these entries:",
                problems,
            )
        return self

    def shared_queries(self, other: EmbeddingQAFinetuneDataset) -> list[str]:
        """Ids of the queries that `other` has, too, whatever their passages.

        Texts are compared ignoring case and spaces; ids are not, because they often differ between datasets.
        """
        known = {normalise(text) for text in other.queries.values()}
        return [i for i, text in self.queries.items() if normalise(text) in known]

    def shared_passages(self, other: EmbeddingQAFinetuneDataset) -> set[str]:
        """Ids of the passages that answer a query here and, with the same text (see above), one in `other`."""
        known = {normalise(other.corpus[i]) for i in other.answer_ids()}
        return {i for i in self.answer_ids() if normalise(self.corpus[i]) in known}

    def overlap(self, other: EmbeddingQAFinetuneDataset) -> list[str]:
        """Ids of the queries with a passage that is an answer in `other`, too, or comes from one of its documents."""
        sources, other_sources = self.source_documents or {}, other.source_documents or {}
        documents = {other_sources[i] for i in other.answer_ids() if i in other_sources}
        known = self.shared_passages(other) | {i for i in self.answer_ids() if sources.get(i) in documents}
        return [i for i in self.queries if not known.isdisjoint(self.relevant_docs.get(i, ()))]

    def summary(self) -> dict[str, Any]:
        """What an adapter's manifest records of its training set."""
        return {
            "digest": self.digest(),
            "queries": len(self.queries),
            "passages": len(self.answer_ids()),
            "origins": self.origins(),
        }

    def answer_ids(self) -> set[str]:
        """Ids of all passages that answer at least one query."""
        return {i for query_id in self.queries for i in self.relevant_docs.get(query_id, []) if i in self.corpus}

    def near_duplicates(
        self, texts: Mapping[str, str] | None = None, threshold: float = NEAR_DUPLICATE
    ) -> dict[str, str]:
        """`near_duplicate_groups` of these passages; None compares the whole corpus.

        Each text is hashed once for this dataset, its subsets and its copies together, however often it is compared.
        """
        return near_duplicate_groups(self.corpus if texts is None else texts, threshold, sketches=self._sketches)

    def subset(self, query_ids: Iterable[str], passage_ids: Iterable[str] | None = None) -> EmbeddingQAFinetuneDataset:
        """The dataset of these queries, in this order; `passage_ids=None` keeps the passages that they refer to."""
        kept = [i for i in query_ids if i in self.queries]
        if passage_ids is None:
            referring = (self.relevant_docs, self.hard_negatives or {}, self.judged_irrelevant or {})
            passage_ids = (passage_id for field in referring for i in kept for passage_id in field.get(i, []))
        wanted = self.corpus.keys() & passage_ids
        passages = [i for i in self.corpus if i in wanted]

        def pick(field: dict[str, Any] | None, ids: list[str]) -> dict[str, Any] | None:
            return None if field is None else {i: field[i] for i in ids if i in field}

        def pick_passages(field: dict[str, list[str]] | None) -> dict[str, list[str]] | None:
            lists = pick(field, kept)
            return lists and {q: [i for i in ids if i in wanted] for q, ids in lists.items()}

        part = EmbeddingQAFinetuneDataset(
            queries={i: self.queries[i] for i in kept},
            corpus={i: self.corpus[i] for i in passages},
            relevant_docs={i: self.relevant_docs[i] for i in kept if i in self.relevant_docs},
            source_documents=pick(self.source_documents, passages),
            query_origins=pick(self.query_origins, kept),
            training_passages=pick(self.training_passages, kept),
            hard_negatives=pick_passages(self.hard_negatives),
            relevance_scores=pick(self.relevance_scores, kept),
            judged_irrelevant=pick_passages(self.judged_irrelevant),
        )
        part._sketches = self._sketches
        return part
