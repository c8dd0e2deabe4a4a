"""What queries are compared with where a whole corpus is: its columns, the relevant ones of each query, the ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.training.examples import TrainingGroup
from llama_index_lora_embed.training.negatives.false_negatives import FalseNegatives
from llama_index_lora_embed.training.objectives.full_corpus import Targets


@dataclass(frozen=True)
class CorpusTargets:
    """The columns that queries are compared with.

    Attributes:
        query_ids: The queries, in the order of the other lists.
        columns: (passage id, text) of each column.
        relevant: For each query the columns of its relevant passages.
        relevance: Their grades.
        ignored: For each query the columns of its false negatives.
        curated: For each query the columns of its own hard negatives.
    """

    query_ids: list[str]
    columns: list[tuple[str, str]]
    relevant: list[list[int]]
    relevance: list[list[float]]
    ignored: list[list[int]]
    curated: list[list[int]]

    def batch(self, rows: Sequence[int]) -> Targets:
        """The targets of some of the queries, for `full_corpus_loss`."""
        relevant, ignored = ([of[row] for row in rows] for of in (self.relevant, self.ignored))
        return Targets.of(relevant, [self.relevance[row] for row in rows], ignored)

    def answered(self, rows: Sequence[int]) -> list[int]:
        """The columns that answer one of these queries, or are a hard negative of one."""
        return sorted({column for row in rows for column in (*self.relevant[row], *self.curated[row])})

    def part(self, rows: Sequence[int], columns: Sequence[int]) -> CorpusTargets:
        """The targets of some of the queries among some of the columns; a query can lose its relevant ones."""
        new = {column: at for at, column in enumerate(columns)}

        def kept(of: list[list[int]]) -> list[list[int]]:
            return [[new[column] for column in of[row] if column in new] for row in rows]

        relevance = [
            [s for column, s in zip(self.relevant[row], self.relevance[row], strict=True) if column in new]
            for row in rows
        ]
        return replace(
            self,
            query_ids=[self.query_ids[row] for row in rows],
            columns=[self.columns[column] for column in columns],
            relevant=kept(self.relevant),
            relevance=relevance,
            ignored=kept(self.ignored),
            curated=kept(self.curated),
        )


def corpus_targets(
    dataset: EmbeddingQAFinetuneDataset, groups: Sequence[TrainingGroup], false_negatives: FalseNegatives
) -> CorpusTargets:
    """The targets of all queries of a dataset.

    A column is a passage of the corpus, or the shortened text that a query was cut out of (`training_passages`). All
    of a query's relevant passages are targets, in proportion to their grades: the whole corpus is compared, and each
    that were left out would have to be ignored.

    Args:
        dataset: Queries and corpus.
        groups: The passages with their queries, which know the shortened texts.
        false_negatives: What is ignored, except a query's own hard negatives.
    """
    columns = {(passage_id, text): at for at, (passage_id, text) in enumerate(dataset.corpus.items())}
    cuts: dict[str, int] = {}
    for group in groups:
        column = columns.setdefault((group.passage_id, group.passage), len(columns))
        if group.passage != dataset.corpus[group.passage_id]:
            cuts.update(dict.fromkeys(group.query_ids, column))
    excluded = false_negatives.excluded_columns(dataset.queries, [passage_id for passage_id, _ in columns])
    relevant, relevance, ignored, curated = [], [], [], []
    for query_id, hidden in zip(dataset.queries, excluded, strict=True):
        first, *others = dict.fromkeys(dataset.relevant_docs[query_id])
        own = {cuts.get(query_id, columns[first, dataset.corpus[first]]): dataset.score(query_id, first)}
        own.update({columns[i, dataset.corpus[i]]: dataset.score(query_id, i) for i in others})
        hard = [columns[i, dataset.corpus[i]] for i in (dataset.hard_negatives or {}).get(query_id, ())]
        relevant.append(list(own))
        relevance.append([float(score) for score in own.values()])
        ignored.append(sorted(hidden - own.keys() - set(hard)))
        curated.append(hard)
    return CorpusTargets(list(dataset.queries), list(columns), relevant, relevance, ignored, curated)
