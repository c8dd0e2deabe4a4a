"""Real queries without labels: an LLM grades the passages that the models find for them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.llms import LLM
from llama_index.core.prompts import PromptTemplate

from llama_index_lora_embed.config import JOURNAL_NAME, LLMSettings
from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, DatasetError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.llm.client import LLMClient, Request
from llama_index_lora_embed.data.llm.identity import digest
from llama_index_lora_embed.data.llm.journal import Journal
from llama_index_lora_embed.data.llm.passages import printable, truncate
from llama_index_lora_embed.data.origins import LLM_JUDGED
from llama_index_lora_embed.evaluation.judging.grades import GRADING_PROMPT, RUBRIC, THRESHOLD, parse_grade
from llama_index_lora_embed.evaluation.judging.pool import Pool, make_pool
from llama_index_lora_embed.evaluation.judging.result import JudgedQueries, human_labels, judged

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import BaseNode


def judge_queries(
    queries: Any,
    nodes: Sequence[BaseNode],
    models: Mapping[str, BaseEmbedding] | Sequence[BaseEmbedding],
    llm: LLM,
    *,
    top_k: int = 10,
    threshold: int = THRESHOLD,
    journal: str | os.PathLike[str] = JOURNAL_NAME,
    settings: LLMSettings | None = None,
    human: EmbeddingQAFinetuneDataset | JudgedQueries | None = None,
    max_queries: int | None = 500,
    seed: int = 0,
    column: str | None = None,
    num_workers: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
) -> JudgedQueries:
    """Let an LLM grade what models find for queries of users, so that models can be compared on them.

    For each query, the `top_k` best passages of every model and of BM25 are put together (pooling, as at TREC), and the
    LLM grades each of them from 0 to 3 (`grades.RUBRIC`). Each request shows one passage, so that the order of passages
    cannot decide. Grades are in the journal by query and passage: a second run, with another model in the pool or after
    an interruption, requests only those that are missing.

    Pass both models of a later comparison. What a model that was not in the pool finds is partly unjudged, which counts
    as wrong; evaluations on the dataset say how much is, and have metrics that leave it out (`compute_metrics`).

    Args:
        queries: A list of texts, a mapping of ids to texts, or a log (see `read_queries`): a path, a
            `datasets.Dataset`, a DataFrame, or an iterable of mappings. Queries with the same wording (ignoring case
            and spaces) are merged.
        nodes: The nodes that are searched. They become the corpus.
        models: Embedding models by name, or a list of them.
        llm: Any LlamaIndex LLM.
        top_k: Passages of each model and of BM25. 10 is the depth of the metrics here. With two models there are at
            most 30 requests for each query, and fewer where they find the same passages.
        threshold: Lowest grade of a relevant passage, 1 to 3. Passages below are `judged_irrelevant`.
        journal: Where the answers are kept.
        settings: Concurrency, retries, and limits. Answers other than a grade are requested again up to `attempts`
            times in all; passages without a grade after that are counted and stay unjudged.
        human: Labels by people for some of the queries and passages, to report the agreement with: what
            `label_queries` returned, of which all grades count with the threshold here, or a dataset. Of a dataset
            with `judged_irrelevant` the passages without a label are left out, and its queries may be without a
            relevant passage; otherwise passages without a label count as irrelevant.
        max_queries: Queries to judge; of more, a random sample is judged, and reported. None judges all. 500 queries
            give a 95 % interval of about ±0.03 around a difference in nDCG@10.
        seed: Random seed of the sample.
        column: Column of the queries in a log.
        num_workers: See `evaluate_retrieval`.
        cache_folder: See `evaluate_retrieval`.

    Returns:
        The dataset, whose queries have the origin "llm_judged"; the report; and the grades. Queries without a relevant
        passage are counted and left out of the dataset, and so are queries that a limit of `settings` cut off.

    Raises:
        ConfigError: An argument has the wrong type or value, or there is no column of queries.
        DatasetError: There are no queries or no nodes with text, two queries share an id, none of the queries has a
            relevant passage, or no pooled passage has a human label.
        LLMError: The LLM fails or refuses altogether.
        JournalError: The journal cannot be used.

    Example:
        >>> result = judge_queries("queries.csv", nodes, {"base": base, "tuned": tuned}, llm)  # doctest: +SKIP
        >>> print(result.report)  # doctest: +SKIP
        >>> print(compare_retrieval(base, tuned, result.dataset))  # doctest: +SKIP
    """
    if not isinstance(llm, LLM):
        raise ConfigError(f"llm={llm!r:.60}", "a LlamaIndex LLM", "Pass for example llm=Settings.llm.")
    if human is not None and not isinstance(human, JudgedQueries):
        human = EmbeddingQAFinetuneDataset.coerce(human, "human").check("human dataset", unanswered=True)
    settings = settings or LLMSettings()
    pool = make_pool(
        queries,
        nodes,
        models,
        top_k=top_k,
        threshold=threshold,
        max_queries=max_queries,
        seed=seed,
        column=column,
        num_workers=num_workers,
        cache_folder=cache_folder,
        show_progress=settings.show_progress,
    )
    labels = None if human is None else human_labels(human, pool, threshold)
    pairs = [(query_id, passage_id) for query_id, ids in pool.passages.items() for passage_id in ids]
    with Journal(journal) as opened:
        client = LLMClient(llm, opened, settings, lambda answer: parse_grade(answer) is not None)
        requests = (_request(pool, *pair, llm) for pair in pairs)
        report = run_async(client.complete_all(requests, total=len(pairs)))
        answers = {pair: client.answer(_request(pool, *pair, llm)) for pair in pairs}
    grades = {pair: grade for pair, answer in answers.items() if (grade := parse_grade(answer or "")) is not None}
    # the first passages of a query are those of the first model: grades of these alone would favour it
    unfinished = {query_id for query_id, passage_id in pairs if report.stopped and (query_id, passage_id) not in grades}
    result = judged(pool, grades, unfinished, origin=LLM_JUDGED, threshold=threshold, labels=labels, llm=report)
    if not result.dataset.queries:
        raise DatasetError(
            f"{len(pool.queries)} queries, none of them with a passage of grade {threshold} or higher",
            "at least one query that the nodes answer",
            "Check that queries and nodes belong together, or use another LLM. The grades are in the journal:",
            str(result.report).splitlines(),
        )
    return result


def _request(pool: Pool, query_id: str, passage_id: str, llm: LLM) -> Request:
    passage = printable(pool.corpus[passage_id])
    return Request(
        template=PromptTemplate(GRADING_PROMPT, rubric=RUBRIC),
        variables={"context_str": truncate(passage, llm), "query_str": printable(pool.queries[query_id])},
        text_hash=digest(passage),
        settings="grade",
        name=f"{query_id}/{passage_id}",
    )
