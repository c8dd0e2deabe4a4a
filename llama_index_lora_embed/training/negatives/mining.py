"""Hard negatives: passages that a model takes for an answer and that are none, mined from the training corpus."""

from __future__ import annotations

import heapq
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import DatasetError, MissingExtraError
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset, normalise
from llama_index_lora_embed.training.negatives.embeddings import Vectors, encode, vector_folder
from llama_index_lora_embed.training.negatives.false_negatives import RANGE_MIN, REPEATED, Corpus, Guard, too_close

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_DEFAULTS = MiningSettings()
_FAISS_FROM = 100_000
# Of one candidate: rows of tensors, Python lists and Arrow columns in sentence-transformers' miner, measured.
_CANDIDATE_BYTES = 500


class MinedNegative(NamedTuple):
    """One negative beside what it is told from; scores are cosine similarities to the question."""

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
        queries: Questions in the dataset.
        with_negatives: Of these, how many have at least one hard negative now.
        with_fewer: Of these, how many have fewer than were asked for, none included.
        mean_negatives: Hard negatives per question, those that the dataset brought along included.
        excluded: Passages passed over on the way to the last negative taken, by reason; a question's own
            positives are not counted.
        audit: Mined negatives that are most like their question, most similar first, for a person to look
            whether they are wrong indeed.
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
            f"hard negatives for {self.with_negatives} of {self.queries} questions, {self.mean_negatives:.2f} each on "
            f"average; {self.with_fewer} with fewer than asked"
        ]
        lines += [f"  passed over: {count} x {reason}" for reason, count in self.excluded.items()]
        if self.audit:
            lines.append("  most like their questions; should one of them be an answer, raise the margins:")
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
    fingerprint: str | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    near_duplicates: Mapping[str, str] | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, MiningReport]:
    """Add to each question the passages that the model ranks high although they do not answer it.

    The dataset's own corpus is searched. Pass training data only: mining the corpus that a model is judged by
    tells it which passages are the wrong ones. To mine again with a tuned model, pass the dataset as it was
    before the first mining, because the hard negatives that a dataset has are taken for curated.

    No negative becomes a passage that answers the question or one of the same wording, one with the same or
    nearly the same text, a neighbour in the same document, a chunk that overlaps a positive, or one whose
    similarity is too near the positive's (the lowest, if there are several).

    Args:
        dataset: Training data; it is not changed. Its own `hard_negatives` are kept first, and count.
        model: Ranks, with its query and document prompts, by cosine similarity.
        settings: How many, how near, how much memory.
        fingerprint: Of the model, prompts included (`adapter.fingerprint`); needed with `cache_folder`.
        cache_folder: Where vectors are kept, in a folder for each fingerprint.
        near_duplicates: Passage id to the id of the first passage with nearly the same text; None finds them.

    Returns:
        A new dataset with `hard_negatives`, best first, and the report.

    Raises:
        ConfigError: Settings cannot be used, `cache_folder` is given without a usable `fingerprint`, or
            `near_duplicates` names other passages.
        DatasetError: The dataset has problems, or its corpus has one text only.
        MissingExtraError: FAISS was asked for and is not installed.
        NonFiniteLossError: The model's vectors are NaN or infinite.
        OutputDirectoryError: The cache cannot be written.
    """
    settings.checked()
    folder = None if cache_folder is None else vector_folder(Path(cache_folder), fingerprint)
    dataset.check("training dataset")
    settings = replace(settings, use_faiss=_choose_faiss(settings, len(dataset.corpus)))
    if near_duplicates is None:
        from llama_index_lora_embed.data.filters.near_duplicates import near_duplicate_groups

        near_duplicates = near_duplicate_groups(dataset.corpus)
    corpus = Corpus.of(dataset, near_duplicates)
    if corpus.texts < 2:
        raise DatasetError(
            f"a corpus with {corpus.texts} different text(s)",
            "at least two: a negative is another passage than the answer",
            "Add documents; passages without questions are mined too.",
        )
    curated = dataset.hard_negatives or {}
    wanted = {q: settings.num_negatives - len(curated.get(q, [])) for q in dataset.queries}
    wanted = {query_id: number for query_id, number in wanted.items() if number > 0}
    found: dict[str, _Choice] = {}
    if wanted:
        questions = [dataset.queries[query_id] for query_id in wanted]
        vectors = Vectors(
            model.device,
            dict(zip(wanted, encode(model, questions, "query", settings, folder), strict=True)),
            corpus.distinct,
            encode(model, [dataset.corpus[i] for i in corpus.distinct], "document", settings, folder),
        )
        found = _choose_all(corpus, vectors, wanted, settings)
    negatives: dict[str, list[str]] = {}
    for query_id in dataset.queries:
        mined = [i for i, _ in found[query_id].negatives] if query_id in found else []
        if both := [*curated.get(query_id, []), *mined]:
            negatives[query_id] = both
    result = dataset.model_copy(update={"hard_negatives": negatives}, deep=True).check("mined dataset")
    return result, _report(result, found, settings)


class _Candidates(NamedTuple):
    """The closest passages of one question, closest first, and its least similar positive."""

    positive_id: str
    positive_score: float
    closest: list[tuple[str, float]]


class _Choice(NamedTuple):
    """The negatives of one question, closest first, its positive, and how many passages were passed over, and why."""

    positive_id: str
    positive_score: float
    negatives: list[tuple[str, float]]
    passed: Counter[str]


def _choose_all(
    corpus: Corpus, vectors: Vectors, wanted: dict[str, int], settings: MiningSettings
) -> dict[str, _Choice]:
    """Look at a few candidates of every question, and at all up to `range_max` where these were too few."""
    dataset = corpus.dataset
    same_wording: dict[str, set[str]] = {}
    for query_id, text in dataset.queries.items():
        same_wording.setdefault(normalise(text), set()).update(dataset.relevant_docs[query_id])
    widest = min(settings.range_max, len(corpus.distinct))
    # ten candidates for each negative, as sentence-transformers takes where margins are set
    narrow = min(settings.range_min + 10 * settings.num_negatives, widest)
    guards: dict[str, Guard] = {}
    found: dict[str, _Choice] = {}
    pending = list(wanted)
    for window in dict.fromkeys((narrow, widest)):
        short: list[str] = []
        for part in _slices(pending, dataset.relevant_docs, window, settings.memory_mb):
            for query_id, candidates in _closest(corpus, vectors, part, window, settings).items():
                wording = normalise(dataset.queries[query_id])
                if wording not in guards:  # a title can be the question of thousands of passages
                    guards[wording] = Guard(corpus, wording, same_wording[wording], settings.sibling_window)
                found[query_id] = _choose(query_id, candidates, guards[wording], wanted[query_id], settings)
                if len(found[query_id].negatives) < wanted[query_id]:
                    short.append(query_id)
        pending = short
    return found


def _choose(query_id: str, candidates: _Candidates, guard: Guard, wanted: int, settings: MiningSettings) -> _Choice:
    """Walk down the candidates until there are as many negatives as wanted."""
    corpus = guard.corpus
    own = {corpus.alike[i] for i in corpus.dataset.relevant_docs[query_id]}
    taken = {corpus.near[i] for i in (corpus.dataset.hard_negatives or {}).get(query_id, [])}
    negatives: list[tuple[str, float]] = []
    passed: Counter[str] = Counter()
    for passage_id, score in candidates.closest:
        if len(negatives) == wanted:
            break
        why = guard.reason(passage_id, own) or too_close(score, candidates.positive_score, settings)
        if why is None and corpus.near[passage_id] in taken:
            why = REPEATED
        if why is None:
            taken.add(corpus.near[passage_id])
            why = RANGE_MIN if passed[RANGE_MIN] < settings.range_min else None
        if why is None:
            negatives.append((passage_id, score))
        else:
            passed[why] += 1
    return _Choice(candidates.positive_id, candidates.positive_score, negatives, passed)


def _slices(query_ids: list[str], relevant: dict[str, list[str]], window: int, memory_mb: float) -> Iterator[list[str]]:
    """Questions in parts whose candidates fit into `memory_mb`."""
    # the miner widens every row by the most positives that a question has
    width = window + max((len(relevant[q]) for q in query_ids), default=0)
    size = max(1, int(memory_mb * 1e6 / (_CANDIDATE_BYTES * width)))
    for start in range(0, len(query_ids), size):
        yield query_ids[start : start + size]


def _closest(
    corpus: Corpus, vectors: Vectors, query_ids: list[str], window: int, settings: MiningSettings
) -> dict[str, _Candidates]:
    """The `window` closest passages of each question, by sentence-transformers' miner, without its positives."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives as search

    relevant = corpus.dataset.relevant_docs
    positives = {q: list(dict.fromkeys(corpus.first[i] for i in relevant[q])) for q in query_ids}
    pairs = [(query_id, i) for query_id, ids in positives.items() for i in ids]
    mined = search(
        Dataset.from_dict({"query": [q for q, _ in pairs], "passage": [i for _, i in pairs]}),
        vectors,  # type: ignore[arg-type]  # all that the miner asks of a model
        corpus=vectors.passage_ids,
        range_max=window,
        num_negatives=window,
        output_format="labeled-pair",  # one row a candidate; others repeat the candidates for every positive
        output_scores=True,
        faiss_batch_size=max(1, int(settings.memory_mb * 1e6 / (4 * len(vectors.passage_ids)))),
        use_faiss=bool(settings.use_faiss),
        verbose=False,
    )
    scores: dict[str, dict[str, float]] = {query_id: {} for query_id in query_ids}
    rows = mined.to_dict()  # iterating over a column reads it row by row, several times as slowly
    for query_id, passage_id, score in zip(rows["query"], rows["passage"], rows["score"], strict=True):
        scores[query_id][passage_id] = score
    row = {passage_id: at for at, passage_id in enumerate(vectors.passage_ids)}
    found = {}
    for query_id, of_passage in scores.items():
        lowest = min(positives[query_id], key=of_passage.__getitem__)
        others = of_passage.keys() - set(positives[query_id])
        # equal scores in the order of the corpus, whichever search found them
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
    passed: Counter[str] = sum((choice.passed for choice in found.values()), Counter())
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
        excluded=dict(passed.most_common()),
        audit=tuple(audit),
    )
