"""Graded passages as a dataset, with a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.llm.client import LLMReport
from llama_index_lora_embed.data.text import normalise
from llama_index_lora_embed.evaluation.judging.grades import HIGHEST, Agreement, agreement
from llama_index_lora_embed.evaluation.judging.pool import Pool

Labels = Mapping[tuple[str, str], float | None]
"""(query id, passage id) to a human grade from 0 to 1, or None where there is no label."""


@dataclass(frozen=True)
class JudgingReport:
    """What was judged, and what was left out.

    Attributes:
        distinct: Different queries given.
        queries: Those of them that were chosen to be judged; fewer where `max_queries` is less.
        answered: Queries with a relevant passage, which are in the dataset.
        unanswered: Queries without one, which are left out.
        unfinished: Queries that are left out because judging stopped before all of their passages were seen.
        pooled: Passages to be graded, over all queries.
        grades: Number of passages by grade.
        ungraded: Passages of judged queries without a usable grade, which count as unjudged.
        retrievers: What the passages are from.
        skipped: Queries and nodes left out before, by reason.
        agreement: Agreement with human labels; None without any.
        llm: The requests; None if a person graded.
    """

    distinct: int
    queries: int
    answered: int
    unanswered: int
    unfinished: int
    pooled: int
    grades: dict[int, int]
    ungraded: int
    retrievers: tuple[str, ...]
    skipped: dict[str, int]
    agreement: Agreement | None = None
    llm: LLMReport | None = None

    def __str__(self) -> str:
        counts = {"without a relevant passage": self.unanswered, "not finished": self.unfinished}
        left_out = "".join(f", {count} {reason}" for reason, count in counts.items() if count)
        sampled = f" (a sample of {self.distinct})" if self.queries < self.distinct else ""
        grades = ", ".join(f"{count} x {grade}" for grade, count in self.grades.items())
        lines = [
            f"{self.queries} queries{sampled}: {self.answered} with a relevant passage{left_out}",
            f"{self.pooled} passages from {', '.join(self.retrievers)}; grades: {grades or 'none'}; "
            f"{self.ungraded} without a usable grade",
        ]
        if skipped := ", ".join(f"{count} x {reason}" for reason, count in self.skipped.items() if count):
            lines.append(f"left out: {skipped}")
        return "\n".join([*lines, *(str(part) for part in (self.agreement, self.llm) if part is not None)])


@dataclass(frozen=True)
class JudgedQueries:
    """Queries whose passages were graded.

    Attributes:
        dataset: The queries with a relevant passage, all nodes as the corpus, grades divided by 3 as
            `relevance_scores`, and passages below the threshold as `judged_irrelevant`.
        report: Counts.
        queries: Query id to text of all judged queries, answered or not.
        grades: Query id to passage id to grade, 0 to 3, of the same queries.
    """

    dataset: EmbeddingQAFinetuneDataset = field(repr=False)
    report: JudgingReport
    queries: dict[str, str] = field(repr=False)
    grades: dict[str, dict[str, int]] = field(repr=False)


def judged(
    pool: Pool,
    grades: Mapping[tuple[str, str], int],
    unfinished: set[str],
    *,
    origin: str,
    threshold: int,
    labels: Labels | None = None,
    llm: LLMReport | None = None,
) -> JudgedQueries:
    """Make the dataset and the report of graded passages.

    Args:
        pool: What was to be graded.
        grades: (query id, passage id) to grade.
        unfinished: Queries to leave out.
        origin: `query_origins` of all queries.
        threshold: Lowest grade of a relevant passage.
        labels: Human labels to compare with.
        llm: The requests.
    """
    finished = [query_id for query_id in pool.queries if query_id not in unfinished]
    known = {q: {i: grades[q, i] for i in pool.passages[q] if (q, i) in grades} for q in finished}
    by_query = {  # a passage that stands in the corpus twice has its grade twice
        q: {copy: grade for i, grade in found.items() for copy in pool.copies[pool.corpus[i]]}
        for q, found in known.items()
    }
    relevant = {q: [i for i, g in found.items() if g >= threshold] for q, found in by_query.items()}
    answered = [q for q in finished if relevant[q]]
    dataset = EmbeddingQAFinetuneDataset(
        queries={q: pool.queries[q] for q in answered},
        corpus=pool.corpus,
        relevant_docs={q: relevant[q] for q in answered},
        source_documents=pool.sources,
        query_origins=dict.fromkeys(answered, origin),
        relevance_scores={
            q: {i: by_query[q][i] / HIGHEST for i in relevant[q] if by_query[q][i] < HIGHEST} for q in answered
        },
        judged_irrelevant={q: [i for i, g in by_query[q].items() if g < threshold] for q in answered},
    )
    compared = None
    if labels is not None:
        graded = any(label not in (None, 0, 1) for label in labels.values())
        pairs = [(grade, labels[q, i]) for q, found in known.items() for i, grade in found.items() if (q, i) in labels]
        compared = agreement(
            [grade for grade, _ in pairs], [label for _, label in pairs], threshold=threshold, graded=graded
        )
    counted = Counter(grade for found in known.values() for grade in found.values())
    report = JudgingReport(
        distinct=pool.distinct,
        queries=len(pool.queries),
        answered=len(answered),
        unanswered=len(finished) - len(answered),
        unfinished=len(unfinished),
        pooled=sum(map(len, pool.passages.values())),
        grades=dict(sorted(counted.items(), reverse=True)),
        ungraded=sum(len(pool.passages[q]) for q in finished) - counted.total(),
        retrievers=pool.retrievers,
        skipped=pool.skipped,
        agreement=compared,
        llm=llm,
    )
    return JudgedQueries(dataset, report, {q: pool.queries[q] for q in finished}, by_query)


def human_labels(human: EmbeddingQAFinetuneDataset | JudgedQueries, pool: Pool, threshold: int) -> Labels:
    """The human labels of the pooled passages; queries and passages are matched by their wording.

    Where `human` names irrelevant passages, others without a label are unjudged and are left out. Where it names none,
    they are labelled None.

    Args:
        human: A checked dataset, or what `label_queries` returned.
        pool: What is to be graded.
        threshold: Lowest grade of a relevant passage in what `label_queries` returned.

    Raises:
        DatasetError: No pooled passage has a label.
    """
    if isinstance(human, JudgedQueries):
        queries, corpus, judged_all = human.queries, human.dataset.corpus, True
        grades = {q: {i: g / HIGHEST * (g >= threshold) for i, g in found.items()} for q, found in human.grades.items()}
    else:
        queries, corpus, judged_all = human.queries, human.corpus, bool(human.judged_irrelevant)
        irrelevant = human.judged_irrelevant or {}
        grades = {q: dict.fromkeys(irrelevant.get(q, ()), 0.0) for q in queries}
        for query_id, found in grades.items():
            found.update({i: human.score(query_id, i) for i in human.relevant_docs.get(query_id, ())})
    asked = {normalise(text) for text in queries.values()}
    known = {normalise(text) for text in corpus.values()}
    given = {
        (normalise(queries[q]), normalise(corpus[i])): grade
        for q, found in grades.items()
        for i, grade in found.items()
    }
    labels: dict[tuple[str, str], float | None] = {}
    for query_id, passage_ids in pool.passages.items():
        query = normalise(pool.queries[query_id])
        for passage_id in passage_ids:
            passage = normalise(pool.corpus[passage_id])
            if (query, passage) in given:
                labels[query_id, passage_id] = given[query, passage]
            elif query in asked and passage in known and not judged_all:
                labels[query_id, passage_id] = None
    if not labels:
        raise DatasetError(
            f"human labels for {len(queries)} queries, none of which is about a pooled passage",
            "labels for the same queries and the same passages",
            "Make the human dataset from the same nodes: its texts are compared, ignoring case and spaces.",
        )
    return labels
