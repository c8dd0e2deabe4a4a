"""Splitting by source document, so that no chunk's sibling is on the other side."""

from __future__ import annotations

import random

from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset, normalise
from llama_index_lora_embed.errors import ConfigError, SplitError


def split_by_source(
    dataset: EmbeddingQAFinetuneDataset,
    val_fraction: float = 0.1,
    *,
    seed: int = 0,
    max_passages: int | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, EmbeddingQAFinetuneDataset]:
    """Split a dataset into training and validation by source document.

    All chunks of a document, and all questions about them, land on one side; a question with answers in
    several documents ties these together, and so does a text that stands in both. The validation questions
    search both sides' passages (up to `max_passages`), because that is the index that a user will search.

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
    groups = _tied_queries(dataset)
    if len(groups) < 2:
        raise SplitError(
            "questions about one source document only, or all tied together",
            "at least two documents, so that one can be held out",
            "Add documents, or pass a val_dataset of your own.",
        )
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


def _tied_queries(dataset: EmbeddingQAFinetuneDataset) -> list[list[str]]:
    """Groups of queries whose answers share a source document or a text, directly or through another query."""
    parent: dict[str, str] = {}

    def find(item: str) -> str:
        while parent.setdefault(item, item) != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for query_id in dataset.queries:
        sources = [dataset.source_of(i) for i in dataset.relevant_docs[query_id]]
        texts = [f"text:{normalise(dataset.corpus[i])}" for i in dataset.relevant_docs[query_id]]
        for other in (*sources[1:], *texts):
            parent[find(sources[0])] = find(other)
    groups: dict[str, list[str]] = {}
    for query_id in dataset.queries:
        groups.setdefault(find(dataset.source_of(dataset.relevant_docs[query_id][0])), []).append(query_id)
    return list(groups.values())
