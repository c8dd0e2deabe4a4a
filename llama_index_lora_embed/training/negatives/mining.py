"""Hard negatives: passages that a model ranks high although they do not answer the query."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from llama_index_lora_embed.config import MiningSettings
from llama_index_lora_embed.core.errors import DatasetError, NonFiniteLossError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.training.negatives.false_negatives import (
    RANGE_MIN,
    REPEATED,
    Corpus,
    FalseNegatives,
    Guard,
    too_close,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

_DEFAULTS = MiningSettings()


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
        NonFiniteLossError: The model's embeddings are NaN or infinite.
    """
    dataset.check("training dataset")
    near_duplicates = dataset.near_duplicates() if near_duplicates is None else near_duplicates
    false_negatives = FalseNegatives(dataset, settings.sibling_window, near_duplicates)
    if false_negatives.corpus.texts < 2:
        raise DatasetError(
            f"a corpus with {false_negatives.corpus.texts} different text(s)",
            "at least two, so that some passage is not the answer",
            "Add documents; passages without queries are searched too.",
        )
    curated = dataset.hard_negatives or {}
    wanted = {q: settings.num_negatives - len(curated.get(q, [])) for q in dataset.queries}
    wanted = {query_id: number for query_id, number in wanted.items() if number > 0}
    found = _choose_all(false_negatives, model, wanted, settings) if wanted else {}
    return with_negatives(dataset, found, settings)


def with_negatives(
    dataset: EmbeddingQAFinetuneDataset, found: dict[str, Choice], settings: MiningSettings
) -> tuple[EmbeddingQAFinetuneDataset, MiningReport]:
    """A copy of the dataset with what was chosen for its queries after their own hard negatives, and the report."""
    curated = dataset.hard_negatives or {}
    negatives: dict[str, list[str]] = {}
    for query_id in dataset.queries:
        mined = [i for i, _ in found[query_id].negatives] if query_id in found else []
        if both := [*curated.get(query_id, []), *mined]:
            negatives[query_id] = both
    result = dataset.model_copy(update={"hard_negatives": negatives}, deep=True).check("mined dataset")
    return result, _report(result, found, settings)


class Candidates(NamedTuple):
    """A query's least similar positive, and the passages most similar to the query, most similar first."""

    positive_id: str
    positive_score: float
    closest: list[tuple[str, float]]


class Choice(NamedTuple):
    """A query's least similar positive, its negatives, most similar first, and excluded passages by reason."""

    positive_id: str
    positive_score: float
    negatives: list[tuple[str, float]]
    excluded: Counter[str]


def _choose_all(
    false_negatives: FalseNegatives, model: SentenceTransformer, wanted: dict[str, int], settings: MiningSettings
) -> dict[str, Choice]:
    """Look at a few candidates of every query, and at all up to `range_max` where these were too few."""
    import torch

    corpus, dataset = false_negatives.corpus, false_negatives.corpus.dataset
    queries = encode(model, [dataset.queries[query_id] for query_id in wanted], "query", settings)
    passages = encode(model, [dataset.corpus[i] for i in corpus.distinct], "document", settings)
    query_rows = dict(zip(wanted, torch.from_numpy(queries).to(model.device), strict=True))
    passage_rows = torch.from_numpy(passages).to(model.device)
    widest = min(settings.range_max, len(corpus.distinct))
    # ten candidates per negative, like sentence-transformers where margins are set
    narrow = min(settings.range_min + 10 * settings.num_negatives, widest)
    found: dict[str, Choice] = {}
    for window in dict.fromkeys((narrow, widest)):
        pending = [q for q in wanted if q not in found or len(found[q].negatives) < wanted[q]]
        for query_id, candidates in _closest(corpus, query_rows, passage_rows, pending, window, settings.memory_mb):
            guard = false_negatives.guard(query_id)
            found[query_id] = choose(query_id, candidates, guard, wanted[query_id], settings)
    return found


def choose(query_id: str, candidates: Candidates, guard: Guard, wanted: int, settings: MiningSettings) -> Choice:
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
    return Choice(candidates.positive_id, candidates.positive_score, negatives, excluded)


def _closest(
    corpus: Corpus, queries: dict[str, Tensor], passages: Tensor, query_ids: list[str], window: int, memory_mb: float
) -> Iterator[tuple[str, Candidates]]:
    """The `window` most similar passages of each query without its positives; equal scores in the corpus's order."""
    import torch

    row = {passage_id: at for at, passage_id in enumerate(corpus.distinct)}
    size = max(1, int(memory_mb * 1e6 / (4 * len(passages))))
    for start in range(0, len(query_ids), size):
        part = query_ids[start : start + size]
        relevant = [dict.fromkeys(row[corpus.first[i]] for i in corpus.dataset.relevant_docs[q]) for q in part]
        similarities = torch.stack([queries[query_id] for query_id in part]) @ passages.T
        depth = min(len(passages), window + max(len(positives) for positives in relevant))
        for query_id, positives, scores, rows in zip(part, relevant, *similarities.topk(depth), strict=True):
            others = zip(scores.tolist(), rows.tolist(), strict=True)
            ranked = sorted((-score, at) for score, at in others if at not in positives)[:window]
            of_positives = (queries[query_id] * passages[list(positives)]).sum(dim=1).tolist()
            lowest, at = min(zip(of_positives, positives, strict=True), key=lambda scored: scored[0])
            closest = [(corpus.distinct[at], -negated) for negated, at in ranked]
            yield query_id, Candidates(corpus.distinct[at], lowest, closest)


def encode(
    model: SentenceTransformer, texts: Sequence[str], task: Literal["query", "document"], settings: MiningSettings
) -> npt.NDArray[np.float32]:
    """Unit embeddings [texts, dimension].

    Raises:
        NonFiniteLossError: Some embeddings are NaN or infinite.
    """
    encode_task = model.encode_query if task == "query" else model.encode_document
    encoded = encode_task(
        list(texts),
        batch_size=settings.batch_size,
        show_progress_bar=settings.show_progress_bar,
        normalize_embeddings=True,
    )
    embeddings = np.asarray(encoded, dtype=np.float32)
    if not_finite := np.flatnonzero(~np.isfinite(embeddings).all(axis=1)).tolist():
        raise NonFiniteLossError(
            f"{len(not_finite)} of {len(texts)} {task} embeddings that are NaN or infinite, the first of "
            f"{texts[not_finite[0]]!r:.80}",
            "finite numbers",
            "Mine with another model, or load this one in float32.",
        )
    return embeddings


def _report(dataset: EmbeddingQAFinetuneDataset, found: dict[str, Choice], settings: MiningSettings) -> MiningReport:
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
