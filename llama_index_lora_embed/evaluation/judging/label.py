"""Real queries without labels: a person grades the passages that the models find for them, in a terminal."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.core.files import append_json_line, read_json_lines
from llama_index_lora_embed.data.llm.identity import digest
from llama_index_lora_embed.data.llm.passages import printable
from llama_index_lora_embed.data.origins import HUMAN
from llama_index_lora_embed.data.text import normalise
from llama_index_lora_embed.evaluation.judging.grades import HIGHEST, RUBRIC, THRESHOLD
from llama_index_lora_embed.evaluation.judging.pool import Pool, make_pool
from llama_index_lora_embed.evaluation.judging.result import JudgedQueries, judged

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import BaseNode

_GRADES = {str(grade) for grade in range(HIGHEST + 1)}
_SKIP, _UNDO, _QUIT = "s", "u", "q"
_KEYS = f"0-{HIGHEST} grade, {_SKIP} skip, {_UNDO} undo, {_QUIT} quit"

Key = tuple[str, str]
"""Wording of a query, and digest of a passage: the same in every run, whatever the ids."""


def label_queries(
    queries: Any,
    nodes: Sequence[BaseNode],
    models: Mapping[str, BaseEmbedding] | Sequence[BaseEmbedding],
    path: str | os.PathLike[str],
    *,
    top_k: int = 5,
    threshold: int = THRESHOLD,
    max_queries: int | None = 20,
    seed: int = 0,
    column: str | None = None,
    num_workers: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    ask: Callable[[str], str] = input,
    show: Callable[[str], None] = print,
) -> JudgedQueries:
    """Grade what models find for queries of users, one passage at a time, in a terminal.

    It does what `judge_queries` does with a person in place of the LLM. The passages of a query come in random order,
    and nothing shows which model found them. Type 0 to 3 for a grade, s to skip a passage, u to undo the last answer,
    and q to quit, each followed by Enter. Each answer is appended to the file at once; the next call with the same file
    continues where this one stopped, and with other models asks only for passages that have no grade yet.

    With the defaults and two models there are at most 15 passages for each query, and fewer where they find the same
    ones; queries for which nothing was relevant are missing in the dataset. The result can be the `human` of
    `judge_queries`, which shows how far to trust an LLM's grades on the others, also on queries without a relevant
    passage.

    Args:
        queries: See `judge_queries`.
        nodes: See `judge_queries`.
        models: See `judge_queries`.
        path: File of the answers, one JSON object per line.
        top_k: Passages of each model and of BM25.
        threshold: See `judge_queries`.
        max_queries: See `judge_queries`. With the same seed they are among those that `judge_queries` samples.
        seed: Random seed of the sample and of the order of passages.
        column: See `judge_queries`.
        num_workers: See `evaluate_retrieval`.
        cache_folder: See `evaluate_retrieval`.
        ask: Shows a prompt and returns what was typed; the end of input counts as quitting.
        show: Shows a text.

    Returns:
        As `judge_queries`, with the origin "human". Queries that were not finished are counted and left out; if there
        is no other one, the dataset is empty.

    Raises:
        ConfigError: See `judge_queries`.
        DatasetError: There are no queries or no nodes with text, two queries share an id, or the file holds something
            else.
        OSError: The file cannot be written.
    """
    answers = _read(Path(path))
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
        show_progress=False,
    )
    keys = {
        (query_id, passage_id): (normalise(pool.queries[query_id]), digest(printable(pool.corpus[passage_id])))
        for query_id in pool.queries
        for passage_id in _shuffled(pool.passages[query_id], f"{seed} {normalise(pool.queries[query_id])}")
    }
    _walk(pool, keys, answers, Path(path), ask, show)
    grades = {pair: int(answers[key]) for pair, key in keys.items() if answers.get(key, _SKIP) in _GRADES}
    unfinished = {query_id for (query_id, _), key in keys.items() if key not in answers}
    result = judged(pool, grades, unfinished, origin=HUMAN, threshold=threshold)
    show(str(result.report))
    return result


def _shuffled(passage_ids: list[str], seed: str) -> list[str]:
    return random.Random(seed).sample(passage_ids, len(passage_ids))


def _walk(
    pool: Pool,
    keys: Mapping[tuple[str, str], Key],
    answers: dict[Key, str],
    path: Path,
    ask: Callable[[str], str],
    show: Callable[[str], None],
) -> None:
    """Ask for each pair without an answer, and write what is typed to `answers` and to the file."""
    show(f"{RUBRIC}\n")
    while (pair := next((pair for pair, key in keys.items() if key not in answers), None)) is not None:
        query_id, passage_id = pair
        number, of_query = list(pool.queries).index(query_id) + 1, [p for q, p in keys if q == query_id]
        show(f"\nQuery {number} of {len(pool.queries)}: {printable(pool.queries[query_id])}")
        show(f"Passage {of_query.index(passage_id) + 1} of {len(of_query)}:\n{printable(pool.corpus[passage_id])}\n")
        try:
            typed = ask(f"{_KEYS}: ").strip().lower()
        except EOFError:
            typed = _QUIT
        if typed == _QUIT:
            return
        if typed == _UNDO:
            ours = set(keys.values())
            last = next((key for key in reversed(answers) if key in ours), None)
            if last is None:
                show("There is nothing to undo.")
            else:
                del answers[last]
                append_json_line(path, {"query": last[0], "text": last[1], "answer": _UNDO})
        elif typed in _GRADES or typed == _SKIP:
            answers[keys[pair]] = typed
            query, text = keys[pair]
            append_json_line(path, {"query": query, "passage": passage_id, "text": text, "answer": typed})
        else:
            show(f"Not understood: {typed!r:.40}.")


def _read(path: Path) -> dict[Key, str]:
    """The answers of earlier calls in their order; creates the file's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size == 0:
        return {}
    answers: dict[Key, str] = {}
    try:
        lines = read_json_lines(path)
        for line in lines:
            key = (line["query"], line["text"])
            answers.pop(key, None)
            if line["answer"] != _UNDO:
                answers[key] = line["answer"]
    except (KeyError, TypeError, OSError, ValueError):
        lines = []
    if not lines:
        raise DatasetError(
            f"{str(path)!r}, which is not a file of answers",
            "a new file, or one that label_queries wrote",
            "Name another file; this one was left as it is.",
        )
    return answers
