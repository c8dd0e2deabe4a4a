"""What a dataset is trained on: groups for in-batch losses, examples with negatives for losses that take columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.text import normalise
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives


@dataclass(slots=True)
class TrainingGroup:
    """One passage and the queries that it answers.

    Several groups can have the id of one node, which inverse cloze cuts in several ways.
    """

    passage: str
    passage_id: str
    query_ids: list[str] = field(default_factory=list)


def make_groups(dataset: EmbeddingQAFinetuneDataset, use_all_docs: bool) -> list[TrainingGroup]:
    """Group the queries by the passage that they are trained against: the first relevant one, or all of them.

    Raises:
        DatasetError: There are fewer than two different passages.
    """
    groups: dict[tuple[str, str], TrainingGroup] = {}
    for query_id in dataset.queries:
        relevant = dataset.relevant_docs[query_id]
        for passage_id in dict.fromkeys(relevant if use_all_docs else relevant[:1]):
            cut = (dataset.training_passages or {}).get(query_id) if passage_id == relevant[0] else None
            text = cut or dataset.corpus[passage_id]
            group = groups.setdefault((passage_id, text), TrainingGroup(text, passage_id))
            group.query_ids.append(query_id)
    texts = (normalise(dataset.corpus[group.passage_id]) for group in groups.values())
    first = next(texts, None)
    if all(text == first for text in texts):
        raise DatasetError(
            "a training set with queries about one passage only",
            "queries about at least two different passages, because the others of a batch are its negatives",
            "Add queries about other passages.",
        )
    return list(groups.values())


@dataclass
class Example:
    """A query, a passage that answers it, and (id, text) of passages that do not, hard negatives first."""

    query_id: str
    passage_id: str
    passage: str
    negatives: list[tuple[str, str]]


def make_examples(
    dataset: EmbeddingQAFinetuneDataset,
    groups: list[TrainingGroup],
    false_negatives: FalseNegatives,
    *,
    min_negatives: int = 0,
    equal_numbers: bool = True,
) -> list[Example]:
    """Make an example for each query and passage that it is trained against.

    Its negatives are the query's hard negatives. Where there are too few, passages of other groups that are no false
    negatives follow, up to `min_negatives`, or with `equal_numbers` up to the largest number of hard negatives; each
    example starts looking further on than the example before.
    """
    curated = dataset.hard_negatives or {}
    pairs = [(query_id, group) for group in groups for query_id in group.query_ids]
    width = max([min_negatives, *(len(curated.get(q, ())) for q, _ in pairs)]) if equal_numbers else min_negatives
    examples: list[Example] = []
    for number, (query_id, group) in enumerate(pairs):
        negatives = [(i, dataset.corpus[i]) for i in curated.get(query_id, ())]
        texts = {text for _, text in negatives}
        for other in (groups[(number + step) % len(groups)] for step in range(1, len(groups))):
            if len(negatives) >= width:
                break
            if other.passage not in texts and not false_negatives.excludes(query_id, other.passage_id):
                texts.add(other.passage)
                negatives.append((other.passage_id, other.passage))
        examples.append(Example(query_id, group.passage_id, group.passage, negatives))
    return examples


def negative_columns(
    dataset: EmbeddingQAFinetuneDataset, examples: list[Example], most: int | None = None
) -> list[dict[str, Any]]:
    """Rows with the columns anchor, positive, negative_1, ...: as many as every example has negatives, or `most`."""
    widths = [len(example.negatives) for example in examples]
    width = min(widths if most is None else [*widths, most])
    return [
        {
            "anchor": dataset.queries[example.query_id],
            "positive": example.passage,
            **{f"negative_{n}": text for n, (_, text) in enumerate(example.negatives[:width], 1)},
        }
        for example in examples
    ]


def label_columns(dataset: EmbeddingQAFinetuneDataset, examples: list[Example]) -> list[dict[str, Any]]:
    """Rows with the columns anchor, positive, label: a passage with its relevance, or a negative with label 0."""
    rows: list[dict[str, Any]] = []
    for example in examples:
        query = dataset.queries[example.query_id]
        score = float(dataset.score(example.query_id, example.passage_id))
        rows.append({"anchor": query, "positive": example.passage, "label": score})
        rows += [{"anchor": query, "positive": text, "label": 0.0} for _, text in example.negatives]
    return rows


def find_false_negatives(
    dataset: EmbeddingQAFinetuneDataset,
    groups: list[TrainingGroup],
    objective: ObjectiveSettings,
    *,
    whole_corpus: bool = False,
) -> FalseNegatives:
    """The false negatives of a dataset, by the masks of an objective; `whole_corpus` if all of it are negatives."""
    near_duplicates = None
    if objective.mask_near_duplicates and whole_corpus:
        near_duplicates = dataset.near_duplicates()
    elif objective.mask_near_duplicates:
        # the rest of the corpus is in no batch
        used = dataset.answer_ids() | {i for ids in (dataset.hard_negatives or {}).values() for i in ids}
        used |= {group.passage_id for group in groups}
        near_duplicates = dataset.near_duplicates({i: text for i, text in dataset.corpus.items() if i in used})
    return FalseNegatives(dataset, objective.sibling_window, near_duplicates)


def require_negatives(examples: Sequence[Example]) -> None:
    """Raise DatasetError, whose `.problems` name the queries, unless every example has a negative."""
    if without := sorted({example.query_id for example in examples if not example.negatives}):
        raise DatasetError(
            f"{len(without)} queries for which no passage can be a negative",
            "passages of other documents, or further away in the same document",
            "Add passages, give these queries hard_negatives, or lower sibling_window:",
            without,
        )


def require_any_negative(
    dataset: EmbeddingQAFinetuneDataset, groups: list[TrainingGroup], false_negatives: FalseNegatives
) -> None:
    """Check that some query has a negative: in a batch, queries can lack negatives now and then, but not always.

    Raises:
        DatasetError: No query has a negative.
    """
    positions = false_negatives.index([group.passage_id for group in groups])
    for group in groups:
        for query_id in group.query_ids:
            if (dataset.hard_negatives or {}).get(query_id):
                return
            if len(false_negatives.among(query_id, positions)) < len(groups):
                return
    raise DatasetError(
        "training passages that are all false negatives of each other (copies, neighbors in one document, or "
        "passages of the same queries)",
        "at least one query with a negative among them",
        "Add documents, or set sibling_window=0 in ObjectiveSettings if neighboring passages do not answer each "
        "other's queries.",
    )
