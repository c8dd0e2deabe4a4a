"""What queries are compared with where a whole corpus is."""

from __future__ import annotations

import pytest

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.training.examples import make_groups
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.corpus_targets import CorpusTargets, corpus_targets


def targets_of(dataset: EmbeddingQAFinetuneDataset) -> CorpusTargets:
    return corpus_targets(dataset, make_groups(dataset, use_all_docs=False), FalseNegatives(dataset, 0))


@pytest.fixture
def targets() -> CorpusTargets:
    return targets_of(
        EmbeddingQAFinetuneDataset(
            queries={"a": "first", "b": "second", "c": "third"},
            corpus={"p": "One.", "q": "Two.", "twin": "ONE.", "r": "Three.", "s": "Four."},
            relevant_docs={"a": ["p", "q"], "b": ["r"], "c": ["q"]},
            relevance_scores={"a": {"q": 0.5}},
            training_passages={"c": "Two, cut."},
            hard_negatives={"a": ["twin"], "b": ["s"]},
        )
    )


def test_all_relevant_passages_are_targets_by_their_grade_and_copies_are_ignored(targets: CorpusTargets) -> None:
    assert targets.columns[5] == ("q", "Two, cut.")
    assert targets.relevant == [[0, 1], [3], [5]]
    assert targets.relevance == [[1.0, 0.5], [1.0], [1.0]]
    # the copy that somebody named as a hard negative stays one; a query's whole passage is none beside its cut
    assert targets.ignored == [[5], [], [1]]


def test_a_part_keeps_rows_and_columns_together(targets: CorpusTargets) -> None:
    assert targets.answered([1]) == [3, 4]
    part = targets.part([2, 0], [1, 2, 5])
    assert part.query_ids == ["c", "a"]
    assert [passage_id for passage_id, _ in part.columns] == ["q", "twin", "q"]
    assert (part.relevant, part.relevance, part.ignored) == ([[2], [0]], [[1.0], [0.5]], [[0], [2]])
    batch = part.batch([1])
    assert batch.relevant.tolist() == [[0], [0]]
    assert batch.ignored.tolist() == [[0], [2]]
