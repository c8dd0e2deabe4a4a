"""Hard negatives: passages that a model ranks high although they do not answer the query."""

from __future__ import annotations

import heapq
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import DatasetError, MissingExtraError
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.text import normalise
from llama_index_lora_embed.training.negatives.embeddings import PrecomputedEmbeddings, encode
from llama_index_lora_embed.training.negatives.false_negatives import RANGE_MIN, REPEATED, Corpus, Guard, too_close

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_DEFAULTS = MiningSettings()
_FAISS_FROM = 100_000  # passages
_CANDIDATE_BYTES = 500  # measured: tensors, lists and Arrow columns of sentence-transformers' miner


class MinedNegative(NamedTuple):
    """A mined negative with its query and positive; scores are cosine similarities to the query."""

    query_id: str
    query: str
    positive_id: str
    positive: str
    positive_score: float
    negative_id: str
    negative: str
    negative_score: float


@dataclass(frozen=True)
class MiningReport:
    """What mining found.

    Attributes:
        queries: Number of queries in the dataset.
        with_negatives: Number of queries that have at least one hard negative now.
        with_fewer: Number of queries that have fewer than `num_negatives`, those without any included.
        mean_negatives: Mean number of hard negatives per query, those of the dataset included.
        excluded: Number of passages that ranked above the last negative and were excluded, by reason; a query's own
            positives are not counted.
        audit: The mined negatives that are most similar to their query, most similar first, to be checked by a person.
    """

    queries: int
    with_negatives: int
    with_fewer: int
    mean_negatives: float
    excluded: dict[str, int] = field(default_factory=dict)
    audit: tuple[MinedNegative, ...] = ()

    def __str__(self) -> str:
        """Counts, then the audit sample."""
        lines = [
            f"hard negatives for {self.with_negatives} of {self.queries} queries, {self.mean_negatives:.2f} per query; "
            f"{self.with_fewer} queries with fewer than num_negatives"
        ]
        lines += [f"  excluded: {count} x {reason}" for reason, count in self.excluded.items()]
        if self.audit:
            lines.append("  negatives most similar to their query; if one of them answers it, raise the margins:")
        for one in self.audit:
            lines.append(f"    {one.query!r:.100}")
            lines.append(f"      positive {one.positive_score:.3f} {one.positive_id}: {one.positive!r:.100}")
            lines.append(f"      negative {one.negative_score:.3f} {one.negative_id}: {one.negative!r:.100}")
        return "\n".join(lines)


def mine_hard_negatives(
    dataset: EmbeddingQAFinetuneDataset,
    model: SentenceTransformer,
    settings: MiningSettings = _DEFAULTS,
    *,
    near_duplicates: Mapping[str, str] | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, MiningReport]:
    """Add to each query the passages that the model ranks high although they do not answer it.

    The dataset's own corpus is searched. Pass training data only: negatives from the corpus that a model is evaluated
    on tell it which passages are wrong there. To mine again with a tuned model, pass the dataset as it was before the
    first mining, because a dataset's own hard negatives are never excluded.

    A passage is excluded if it answers the query or one of the same wording, has the same or nearly the same text as
    such a passage, is its neighbor in the same document, overlaps it, or is nearly as similar to the query as the
    least similar positive.

    Args:
        dataset: Training data; it is not changed. Its own `hard_negatives` come first, and count.
        model: Ranks by cosine similarity, with its query and document prompts.
        settings: Number of negatives, margins, memory.
        near_duplicates: Passage id to the first id with nearly the same text; None finds them.

    Returns:
        A new dataset with `hard_negatives`, most similar first, and the report.

    Raises:
        ConfigError: `near_duplicates` has ids that are not in the corpus.
        DatasetError: The dataset has problems, or its corpus has one text only.
        MissingExtraError: `use_faiss` is True and FAISS is not installed.
        NonFiniteLossError: The model's embeddings are NaN or infinite.
    """
    dataset.check("training dataset")
    settings = settings.replace(use_faiss=_choose_faiss(settings, len(dataset.corpus)))
    corpus = Corpus.of(dataset, dataset.near_duplicates() if near_duplicates is None else near_duplicates)
    if corpus.texts < 2:
        raise DatasetError(
            f"a corpus with {corpus.texts} different text(s)",
            "at least two, so that some passage is not the answer",
            "Add documents; passages without queries are searched too.",
        )
    curated = dataset.hard_negatives or {}
    wanted = {q: settings.num_negatives - len(curated.get(q, [])) for q in dataset.queries}
    wanted = {query_id: number for query_id, number in wanted.items() if number > 0}
    found: dict[str, _Choice] = {}
    if wanted:
        queries = [dataset.queries[query_id] for query_id in wanted]
        embeddings = PrecomputedEmbeddings(
            model.device,
            dict(zip(wanted, encode(model, queries, "query", settings), strict=True)),
            corpus.distinct,
            encode(model, [dataset.corpus[i] for i in corpus.distinct], "document", settings),
        )
        found = _choose_all(corpus, embeddings, wanted, settings)
    negatives: dict[str, list[str]] = {}
    for query_id in dataset.queries:
        mined = [i for i, _ in found[query_id].negatives] if query_id in found else []
        if both := [*curated.get(query_id, []), *mined]:
            negatives[query_id] = both
    result = dataset.model_copy(update={"hard_negatives": negatives}, deep=True).check("mined dataset")
    return result, _report(result, found, settings)


class _Candidates(NamedTuple):
    """The passages most similar to a query, most similar first, and its least similar positive."""

    positive_id: str
    positive_score: float
    closest: list[tuple[str, float]]


class _Choice(NamedTuple):
    """The negatives of a query, most similar first, its positive, and the number of excluded passages by reason."""

    positive_id: str
    positive_score: float
    negatives: list[tuple[str, float]]
    excluded: Counter[str]


def _choose_all(
    corpus: Corpus, embeddings: PrecomputedEmbeddings, wanted: dict[str, int], settings: MiningSettings
) -> dict[str, _Choice]:
    """Look at a few candidates of every query, and at all up to `range_max` where these were too few."""
    dataset = corpus.dataset
    same_wording: dict[str, set[str]] = {}
    for query_id, text in dataset.queries.items():
        same_wording.setdefault(normalise(text), set()).update(dataset.relevant_docs[query_id])
    widest = min(settings.range_max, len(corpus.distinct))
    # ten candidates per negative, like sentence-transformers where margins are set
    narrow = min(settings.range_min + 10 * settings.num_negatives, widest)
    guards: dict[str, Guard] = {}
    found: dict[str, _Choice] = {}
    pending = list(wanted)
    for window in dict.fromkeys((narrow, widest)):
        short: list[str] = []
        for part in _slices(pending, dataset.relevant_docs, window, settings.memory_mb):
            for query_id, candidates in _closest(corpus, embeddings, part, window, settings).items():
                wording = normalise(dataset.queries[query_id])
                if wording not in guards:  # thousands of passages can have the same title as their query
                    guards[wording] = Guard(corpus, wording, same_wording[wording], settings.sibling_window)
                found[query_id] = _choose(query_id, candidates, guards[wording], wanted[query_id], settings)
                if len(found[query_id].negatives) < wanted[query_id]:
                    short.append(query_id)
        pending = short
    return found


def _choose(query_id: str, candidates: _Candidates, guard: Guard, wanted: int, settings: MiningSettings) -> _Choice:
    """Go down the candidates until there are as many negatives as wanted."""
    corpus = guard.corpus
    own = {corpus.alike[i] for i in corpus.dataset.relevant_docs[query_id]}
    taken = {corpus.near[i] for i in (corpus.dataset.hard_negatives or {}).get(query_id, [])}
    negatives: list[tuple[str, float]] = []
    excluded: Counter[str] = Counter()
    for passage_id, score in candidates.closest:
        if len(negatives) == wanted:
            break
        reason = guard.reason(passage_id, own) or too_close(score, candidates.positive_score, settings)
        if reason is None and corpus.near[passage_id] in taken:
            reason = REPEATED
        if reason is None:
            taken.add(corpus.near[passage_id])
            reason = RANGE_MIN if excluded[RANGE_MIN] < settings.range_min else None
        if reason is None:
            negatives.append((passage_id, score))
        else:
            excluded[reason] += 1
    return _Choice(candidates.positive_id, candidates.positive_score, negatives, excluded)


def _slices(query_ids: list[str], relevant: dict[str, list[str]], window: int, memory_mb: float) -> Iterator[list[str]]:
    """Queries in slices whose candidates fit into `memory_mb`."""
    # the miner adds to every row the largest number of positives that a query has
    width = window + max((len(relevant[q]) for q in query_ids), default=0)
    size = max(1, int(memory_mb * 1e6 / (_CANDIDATE_BYTES * width)))
    for start in range(0, len(query_ids), size):
        yield query_ids[start : start + size]


def _closest(
    corpus: Corpus, embeddings: PrecomputedEmbeddings, query_ids: list[str], window: int, settings: MiningSettings
) -> dict[str, _Candidates]:
    """The `window` most similar passages of each query by sentence-transformers' miner, without its positives."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives as search

    relevant = corpus.dataset.relevant_docs
    positives = {q: list(dict.fromkeys(corpus.first[i] for i in relevant[q])) for q in query_ids}
    pairs = [(query_id, i) for query_id, ids in positives.items() for i in ids]
    mined = search(
        Dataset.from_dict({"query": [q for q, _ in pairs], "passage": [i for _, i in pairs]}),
        embeddings,  # type: ignore[arg-type]  # it has what the miner calls
        corpus=embeddings.passage_ids,
        range_max=window,
        num_negatives=window,
        output_format="labeled-pair",  # one row per candidate; other formats repeat the candidates for every positive
        output_scores=True,
        faiss_batch_size=max(1, int(settings.memory_mb * 1e6 / (4 * len(embeddings.passage_ids)))),
        use_faiss=bool(settings.use_faiss),
        verbose=False,
    )
    scores: dict[str, dict[str, float]] = {query_id: {} for query_id in query_ids}
    rows = mined.to_dict()  # iterating over a column is several times slower
    for query_id, passage_id, score in zip(rows["query"], rows["passage"], rows["score"], strict=True):
        scores[query_id][passage_id] = score
    row = {passage_id: at for at, passage_id in enumerate(embeddings.passage_ids)}
    found = {}
    for query_id, of_passage in scores.items():
        lowest = min(positives[query_id], key=of_passage.__getitem__)
        others = of_passage.keys() - set(positives[query_id])
        # equal scores in the order of the corpus, with FAISS and without
        ranked = sorted(others, key=lambda i: (-of_passage[i], row[i]))
        found[query_id] = _Candidates(lowest, of_passage[lowest], [(i, of_passage[i]) for i in ranked])
    return found


def _choose_faiss(settings: MiningSettings, passages: int) -> bool:
    if settings.use_faiss is not None:
        return settings.use_faiss and bool(require("faiss"))
    if passages < _FAISS_FROM:
        return False
    try:
        return bool(require("faiss"))
    except MissingExtraError as error:
        logger.info("searching %d passages without FAISS: %s", passages, error.hint)
        return False


def _report(dataset: EmbeddingQAFinetuneDataset, found: dict[str, _Choice], settings: MiningSettings) -> MiningReport:
    counts = [len((dataset.hard_negatives or {}).get(query_id, [])) for query_id in dataset.queries]
    excluded: Counter[str] = sum((choice.excluded for choice in found.values()), Counter())
    mined = (
        (-score, query_id, passage_id) for query_id, choice in found.items() for passage_id, score in choice.negatives
    )
    audit = []
    for negated, query_id, passage_id in heapq.nsmallest(settings.audit, mined):
        positive_id, score, *_ = found[query_id]
        query, positive, negative = dataset.queries[query_id], dataset.corpus[positive_id], dataset.corpus[passage_id]
        audit.append(MinedNegative(query_id, query, positive_id, positive, score, passage_id, negative, -negated))
    return MiningReport(
        queries=len(counts),
        with_negatives=sum(count > 0 for count in counts),
        with_fewer=sum(count < settings.num_negatives for count in counts),
        mean_negatives=sum(counts) / len(counts),
        excluded=dict(excluded.most_common()),
        audit=tuple(audit),
    )
