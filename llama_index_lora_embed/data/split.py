"""Splitting a dataset by source document, so that chunks of one document are never on both sides."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.errors import ConfigError, SplitError, warn_user
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.grouping import check_fraction, groups_sharing
from llama_index_lora_embed.data.text import normalise

# Queries about one document succeed or fail together, so that a verdict rests on the number of documents; of fewer than
# ten, a tenth is a single document.
_FEWEST_DOCUMENTS = 10
_MOST_TIED = 0.5  # of the queries; near-duplicates that tie more than this are a template, not copies
_EXAMPLES = 5


@dataclass(frozen=True)
class SplitReport:
    """What the two sides of a split hold and have in common.

    Attributes:
        train_documents: Source documents with passages that answer training queries; `val_documents` accordingly.
        near_duplicates: Relevant validation passages that are near-duplicates of a relevant training passage.
        near_duplicate_examples: A few of them, as (training passage id, validation passage id).
        shared_wordings: Validation queries that are also training queries (ignoring case and spaces).
    """

    train_documents: int
    val_documents: int
    train_queries: int
    val_queries: int
    near_duplicates: int = 0
    near_duplicate_examples: list[tuple[str, str]] = field(default_factory=list)
    shared_wordings: int = 0

    def __str__(self) -> str:
        lines = [
            f"training: {self.train_queries} queries about {self.train_documents} documents",
            f"validation: {self.val_queries} queries about {self.val_documents} documents",
            f"validation passages that are near-duplicates of training passages: {self.near_duplicates}",
        ]
        lines += [f"  {val!r} of {train!r}" for train, val in self.near_duplicate_examples]
        return "\n".join([*lines, f"validation queries that are also training queries: {self.shared_wordings}"])


def split_report(train: EmbeddingQAFinetuneDataset, val: EmbeddingQAFinetuneDataset) -> SplitReport:
    """Count what is on each side of a split, and what is on both although it should not be.

    The two may come from elsewhere than `split_by_source`, and may use the same ids for other texts.
    """
    train_answers, val_answers = train.answer_ids(), val.answer_ids()
    texts = {f"train:{i}": text for i, text in train.corpus.items() if i in train_answers}
    texts |= {f"val:{i}": text for i, text in val.corpus.items() if i in val_answers}
    groups = train.near_duplicates(texts)
    # training passages come first, so that a group that has any begins with one
    pairs = [(first, i) for i, first in groups.items() if i.startswith("val:") and first.startswith("train:")]
    return SplitReport(
        train_documents=len({train.source_of(i) for i in train_answers}),
        val_documents=len({val.source_of(i) for i in val_answers}),
        train_queries=len(train.queries),
        val_queries=len(val.queries),
        near_duplicates=len(pairs),
        near_duplicate_examples=[(a.removeprefix("train:"), b.removeprefix("val:")) for a, b in pairs[:_EXAMPLES]],
        shared_wordings=len(val.shared_queries(train)),
    )


def split_by_source(
    dataset: EmbeddingQAFinetuneDataset,
    val_fraction: float = 0.1,
    *,
    seed: int = 0,
    max_passages: int | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """Split a dataset into training and validation by source document.

    All chunks of a document and all queries about them are on one side. A query with relevant passages in several
    documents ties these together, and so do equal texts and near-duplicates (see `near_duplicate_groups`). The
    validation queries search the passages of both sides, up to `max_passages`, because that is the index that users
    will search.

    Warns (UserWarning) where the queries are about fewer than ten documents, and where near-duplicates tie more than
    half of the queries together, as pages of one template do: then only equal texts tie.

    Args:
        dataset: Dataset; a passage without a recorded source counts as a document of its own.
        val_fraction: Share of the queries to aim for, above 0 and below 1.
        seed: Random seed of the order in which documents are drawn.
        max_passages: Maximum size of the validation corpus; relevant passages are always in it.

    Raises:
        ConfigError: `val_fraction` is not between 0 and 1.
        DatasetError: The dataset is empty or has problems.
        SplitError: All queries are tied to one document.
    """
    check_fraction(val_fraction, "val_fraction")
    dataset = EmbeddingQAFinetuneDataset.coerce(dataset).check()
    groups = _tied_groups(dataset)
    if len(groups) < 2:
        raise SplitError(
            "queries about one source document only, or all tied together",
            "at least two documents, so that one can be held out",
            "Add documents, or pass a val_dataset of your own.",
        )
    documents = len({dataset.source_of(i) for i in dataset.answer_ids()})
    if documents < _FEWEST_DOCUMENTS:
        warn_user(
            f"The queries are about {documents} documents, fewer than {_FEWEST_DOCUMENTS}: a verdict on the few that "
            "are held out says little about others. Add documents, or pass a val_dataset of your own."
        )
    rng = random.Random(seed)
    rng.shuffle(groups)
    # most of the queries, where they are tied together, are trained on, and never held out as a whole
    groups.sort(key=lambda group: 2 * len(group) <= len(dataset.queries))
    wanted = max(1, round(val_fraction * len(dataset.queries)))
    held_out: list[str] = []
    while groups[1:] and len(held_out) < wanted:
        held_out += groups.pop()
    return _sides(dataset, held_out, [query_id for group in groups for query_id in group], max_passages, rng)


def folds_by_source(
    dataset: EmbeddingQAFinetuneDataset, count: int, *, seed: int = 0, max_passages: int | None = None
) -> list[tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]]:
    """Splits as by `split_by_source`, such that each query is a validation query in one of them.

    Args:
        dataset: Dataset.
        count: Number of folds, at least 2.
        seed: Random seed of the order in which documents are dealt out.
        max_passages: Maximum size of each validation corpus.

    Returns:
        (training, validation) of each fold.

    Raises:
        ConfigError: `count` is below 2.
        SplitError: There are fewer groups of queries that are tied together than folds.
    """
    if not is_int(count, 2):
        raise ConfigError(f"folds={count!r}", "a whole number of at least 2", "3 trains three times for each choice.")
    groups = _tied_groups(dataset)
    if len(groups) < count:
        raise SplitError(
            f"queries about {len(groups)} source document(s), or groups of them that are tied together",
            f"at least {count}, one for each fold",
            "Add documents, or take fewer folds.",
        )
    rng = random.Random(seed)
    rng.shuffle(groups)
    parts: list[list[str]] = [[] for _ in range(count)]
    for group in sorted(groups, key=len, reverse=True):
        min(parts, key=len).extend(group)
    return [
        _sides(dataset, part, [i for other in parts if other is not part for i in other], max_passages, rng)
        for part in parts
    ]


def _sides(
    dataset: EmbeddingQAFinetuneDataset,
    held_out: list[str],
    trained: list[str],
    max_passages: int | None,
    rng: random.Random,
) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """Training and validation from the ids of their queries."""
    answers = {i for q in held_out for i in dataset.relevant_docs[q]}
    held_sources = {dataset.source_of(i) for i in answers}
    others = [i for i in dataset.corpus if i not in answers]
    if max_passages is not None:
        others = rng.sample(others, min(len(others), max(0, max_passages - len(answers))))
    val = dataset.subset(held_out, answers.union(others))
    # passages without queries are not trained on, but they belong to the corpus that is indexed
    passages = [i for i in dataset.corpus if dataset.source_of(i) not in held_sources]
    return dataset.subset(trained, passages), val


def halves(dataset: EmbeddingQAFinetuneDataset) -> tuple[list[str], list[str]]:
    """The ids of the queries in two parts, to choose something on the first one and to judge the choice on the second.

    They are tied as in `split_by_source`; groups are dealt out, the largest first, to the smaller part. The first part
    is the larger one. If all queries are tied together, it has all of them.

    Args:
        dataset: A checked dataset.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for group in sorted(_tied_groups(dataset), key=len, reverse=True):
        min(parts, key=len).extend(group)
    first, second = sorted(parts, key=len, reverse=True)
    return first, second


def _tied_groups(dataset: EmbeddingQAFinetuneDataset) -> list[list[str]]:
    """Ids of queries that have to be on one side; near-duplicates tie them, too, unless that ties too many."""
    answers = dataset.answer_ids()
    texts = {i: text for i, text in dataset.corpus.items() if i in answers}
    copies = dataset.near_duplicates(texts)
    exact = _tied_queries(dataset, {i: normalise(text) for i, text in texts.items()})
    groups = _tied_queries(dataset, {i: copies.get(i, i) for i in texts})
    most = max(map(len, groups), default=0)
    if len(groups) == len(exact) or most <= max(_MOST_TIED * len(dataset.queries), max(map(len, exact), default=0)):
        return groups
    warn_user(
        f"Near-duplicate passages tie {most} of {len(dataset.queries)} queries together, so that the split allows "
        "near-duplicates on both sides; validation scores will be too high. split_report(train, val) counts them."
    )
    return exact


def _tied_queries(dataset: EmbeddingQAFinetuneDataset, texts: dict[str, str]) -> list[list[str]]:
    """Groups of queries whose relevant passages share a source document or a text, which `texts` stands for."""
    query_ids = list(dataset.queries)
    ties = {i: (f"source:{dataset.source_of(i)}", f"text:{text}") for i, text in texts.items()}
    keys = ([tie for i in dataset.relevant_docs[query_id] for tie in ties[i]] for query_id in query_ids)
    return [[query_ids[index] for index in group] for group in groups_sharing(keys)]
