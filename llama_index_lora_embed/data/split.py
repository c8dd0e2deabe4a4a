"""Splitting by source document, so that no chunk's sibling is on the other side."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from llama_index_lora_embed.core.errors import ConfigError, SplitError, warn_user
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset, normalise
from llama_index_lora_embed.data.filters.near_duplicates import near_duplicate_groups
from llama_index_lora_embed.data.labelled_pairs import LabelledPairs

FEWEST_DOCUMENTS = 10
"""Documents with questions, below which `split_by_source` warns. Questions about one document succeed or fail together,
so documents are what a verdict counts; of fewer than ten, a tenth of the questions is one document."""

_MOST_TIED = 0.5  # of the questions; near-duplicates that tie more than this are a template, not copies
_EXAMPLES = 5


@dataclass(frozen=True)
class SplitReport:
    """What the two sides of a split hold, and what they share.

    Attributes:
        train_documents: Source documents with answers to training questions.
        val_documents: The same for validation.
        train_questions: Training questions.
        val_questions: Validation questions.
        near_duplicates: Validation passages with questions that are equal, or nearly so, to a training passage with
            questions.
        near_duplicate_examples: A few of them, as (training passage id, validation passage id).
        shared_wordings: Validation questions whose wording a training question has too, but for case and spaces.
    """

    train_documents: int
    val_documents: int
    train_questions: int
    val_questions: int
    near_duplicates: int = 0
    near_duplicate_examples: list[tuple[str, str]] = field(default_factory=list)
    shared_wordings: int = 0

    def __str__(self) -> str:
        lines = [
            f"training: {self.train_questions} questions about {self.train_documents} documents",
            f"validation: {self.val_questions} questions about {self.val_documents} documents",
            f"validation passages that nearly stand in training, too: {self.near_duplicates}",
        ]
        lines += [f"  {val!r} is like {train!r}" for train, val in self.near_duplicate_examples]
        return "\n".join([*lines, f"validation questions that training asks, too: {self.shared_wordings}"])


def split_report(train: EmbeddingQAFinetuneDataset, val: EmbeddingQAFinetuneDataset) -> SplitReport:
    """Count what is on each side of a split, and what should be on one side only.

    Args:
        train: Training dataset.
        val: Validation dataset, from `split_by_source` or of the user's own; its ids may be the same as training's.
    """
    train_answers, val_answers = train.answer_ids(), val.answer_ids()
    texts = {f"train:{i}": text for i, text in train.corpus.items() if i in train_answers}
    texts |= {f"val:{i}": text for i, text in val.corpus.items() if i in val_answers}
    groups = near_duplicate_groups(texts)
    # training's texts come first, so that a group with any of them begins with one
    pairs = [(first, i) for i, first in groups.items() if i.startswith("val:") and first.startswith("train:")]
    wordings = {normalise(text) for text in train.queries.values()}
    return SplitReport(
        train_documents=len({train.source_of(i) for i in train_answers}),
        val_documents=len({val.source_of(i) for i in val_answers}),
        train_questions=len(train.queries),
        val_questions=len(val.queries),
        near_duplicates=len(pairs),
        near_duplicate_examples=[(a.removeprefix("train:"), b.removeprefix("val:")) for a, b in pairs[:_EXAMPLES]],
        shared_wordings=sum(normalise(text) in wordings for text in val.queries.values()),
    )


def split_by_source(
    dataset: EmbeddingQAFinetuneDataset,
    val_fraction: float = 0.1,
    *,
    seed: int = 0,
    max_passages: int | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """Split a dataset into training and validation by source document.

    All chunks of a document, and all questions about them, land on one side; a question with answers in
    several documents ties these together, and so does a text that stands in both, or nearly does (see
    `near_duplicate_groups`; 100,000 passages take half a minute). The validation questions search both sides'
    passages (up to `max_passages`), because that is the index that a user will search.

    Warns (UserWarning) where the questions are about fewer than ten documents, and where near-duplicates tie more
    than half of the questions together, as pages of one template do: then only equal texts tie.

    Args:
        dataset: Dataset; a passage without a recorded source counts as a document of its own.
        val_fraction: Share of the questions to aim for, above 0 and below 1.
        seed: Order in which documents are drawn.
        max_passages: Bound on the validation corpus; the answers are always in it.

    Returns:
        (training, validation).

    Raises:
        ConfigError: `val_fraction` is not between 0 and 1.
        SplitError: All questions hang on one document.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(
            f"val_fraction={val_fraction!r}",
            "a number above 0 and below 1",
            "0.1 holds out a tenth of the questions.",
        )
    groups = _tied_groups(dataset)
    if len(groups) < 2:
        raise SplitError(
            "questions about one source document only, or all tied together",
            "at least two documents, so that one can be held out",
            "Add documents, or pass a val_dataset of your own.",
        )
    _warn_of_few_documents(dataset)
    rng = random.Random(seed)
    rng.shuffle(groups)
    wanted = max(1, round(val_fraction * len(dataset.queries)))
    held_out: list[str] = []
    while groups[1:] and len(held_out) < wanted:
        held_out += groups.pop()
    train = dataset.subset(query_id for group in groups for query_id in group)
    answers = {i for q in held_out for i in dataset.relevant_docs[q]}
    held_sources = {dataset.source_of(i) for i in answers}
    others = [i for i in dataset.corpus if i not in answers]
    if max_passages is not None:
        others = rng.sample(others, min(len(others), max(0, max_passages - len(answers))))
    val = dataset.subset(held_out, answers.union(others))
    # passages without questions are no training data, but they are part of the corpus that is indexed
    train = dataset.subset(train.queries, [i for i in dataset.corpus if dataset.source_of(i) not in held_sources])
    return train, val


def _warn_of_few_documents(dataset: EmbeddingQAFinetuneDataset) -> None:
    documents = len({dataset.source_of(i) for i in dataset.answer_ids()})
    if documents < FEWEST_DOCUMENTS:
        warn_user(
            f"The questions are about {documents} documents, fewer than {FEWEST_DOCUMENTS}: a verdict on the few that "
            "are held out says little about others. Add documents, or pass a val_dataset of your own."
        )


def _tied_groups(dataset: EmbeddingQAFinetuneDataset) -> list[list[str]]:
    """Groups of queries that have to be on one side, tied by near-duplicates too unless these tie too much."""
    answers = dataset.answer_ids()
    equal = {i: normalise(text) for i, text in dataset.corpus.items() if i in answers}
    exact = _tied_queries(dataset, equal)
    copies = near_duplicate_groups({i: dataset.corpus[i] for i in equal})
    groups = _tied_queries(dataset, {i: copies.get(i, i) for i in equal})
    most = max(map(len, groups), default=0)
    if len(groups) == len(exact) or most <= max(_MOST_TIED * len(dataset.queries), max(map(len, exact), default=0)):
        return groups
    warn_user(
        f"Nearly equal passages tie {most} of {len(dataset.queries)} questions together, so that the split lets them "
        "be on both sides; validation will flatter the model. split_report(train, val) counts them."
    )
    return exact


def _tied_queries(dataset: EmbeddingQAFinetuneDataset, texts: dict[str, str]) -> list[list[str]]:
    """Groups of queries whose answers share a source document or a text, directly or through another query.

    Args:
        dataset: Dataset.
        texts: Passage id to what is the same for passages with the same text.
    """
    parent: dict[str, str] = {}

    def find(item: str) -> str:
        while parent.setdefault(item, item) != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for query_id in dataset.queries:
        sources = [dataset.source_of(i) for i in dataset.relevant_docs[query_id]]
        same = [f"text:{texts[i]}" for i in dataset.relevant_docs[query_id]]
        for other in (*sources[1:], *same):
            parent[find(sources[0])] = find(other)
    groups: dict[str, list[str]] = {}
    for query_id in dataset.queries:
        groups.setdefault(find(dataset.source_of(dataset.relevant_docs[query_id][0])), []).append(query_id)
    return list(groups.values())


Trainable = EmbeddingQAFinetuneDataset | LabelledPairs


def hold_out(
    dataset: Trainable, fraction: float, seed: int, max_passages: int, in_vain: Sequence[str] = ()
) -> tuple[Trainable, Trainable | None, str]:
    """`dataset.hold_out`, with a warning where it cannot be split."""
    try:
        return dataset.hold_out(fraction, seed=seed, max_passages=max_passages)
    except SplitError as error:
        idle = f" Without effect: {', '.join(in_vain)}." if in_vain else ""
        warn_user(f"Nothing is held out to judge by: {error}{idle}")
        return dataset, None, ""


def drop_overlap(train: Trainable, val: Trainable, *, drop: bool) -> Trainable:
    """`train.without_overlap`."""
    return train.without_overlap(val, drop=drop)
