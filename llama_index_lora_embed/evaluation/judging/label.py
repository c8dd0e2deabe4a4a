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
SKIP, UNDO, _QUIT = "s", "u", "q"
_KEYS = f"0-{HIGHEST} grade, {SKIP} skip, {UNDO} undo, {_QUIT} quit"

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
    read_answers(path)  # so that a wrong file costs no vectors
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
    labelling = Labelling(pool, path, seed=seed)
    _walk(labelling, ask, show)
    result = labelling.result(threshold)
    show(str(result.report))
    return result


class Labelling:
    """A person's answers about the passages of a pool: each is appended to a file at once.

    Pairs of a query and a passage come query by query, the passages of a query in random order.

    Attributes:
        pool: What is graded.
        pairs: (query id, passage id) of all pairs in the order in which they are asked.

    Args:
        pool: What is graded.
        path: File of the answers; one that exists is continued.
        seed: Random seed of the order of passages.

    Raises:
        DatasetError: The file holds something else.
        OSError: The file's folder cannot be created.
    """

    def __init__(self, pool: Pool, path: str | os.PathLike[str], *, seed: int = 0) -> None:
        self.pool = pool
        self._path = Path(path)
        self._answers = read_answers(path)
        self._keys = {
            (query_id, passage_id): (normalise(pool.queries[query_id]), digest(printable(pool.corpus[passage_id])))
            for query_id in pool.queries
            for passage_id in _shuffled(pool.passages[query_id], f"{seed} {normalise(pool.queries[query_id])}")
        }
        self.pairs = list(self._keys)

    def next(self) -> tuple[str, str] | None:
        """The first pair without an answer; None if there is none left."""
        return next((pair for pair, key in self._keys.items() if key not in self._answers), None)

    def place(self, pair: tuple[str, str]) -> tuple[int, int, int]:
        """Number of a pair's query among the queries, of its passage among those of the query, and how many these are.

        Numbers begin with 1.
        """
        of_query = [passage_id for query_id, passage_id in self.pairs if query_id == pair[0]]
        return list(self.pool.queries).index(pair[0]) + 1, of_query.index(pair[1]) + 1, len(of_query)

    def answered(self) -> int:
        """Number of pairs with an answer."""
        return sum(key in self._answers for key in self._keys.values())

    def answer(self, pair: tuple[str, str], typed: str) -> bool:
        """Store a grade ("0" to "3") or "s", which skips a pair; an earlier answer is replaced.

        Returns:
            False for anything else, which is not stored.

        Raises:
            KeyError: The pair is not in the pool.
            OSError: The file cannot be written.
        """
        query, text = self._keys[pair]
        if typed not in _GRADES and typed != SKIP:
            return False
        append_json_line(self._path, {"query": query, "passage": pair[1], "text": text, "answer": typed})
        self._answers.pop((query, text), None)
        self._answers[query, text] = typed
        return True

    def undo(self) -> bool:
        """Take the last answer back; False if there is none.

        Raises:
            OSError: The file cannot be written.
        """
        ours = set(self._keys.values())
        last = next((key for key in reversed(self._answers) if key in ours), None)
        if last is None:
            return False
        append_json_line(self._path, {"query": last[0], "text": last[1], "answer": UNDO})
        del self._answers[last]
        return True

    def result(self, threshold: int = THRESHOLD) -> JudgedQueries:
        """The graded passages of the queries that are finished; see `label_queries`."""
        known = {pair: self._answers.get(key) for pair, key in self._keys.items()}
        grades = {pair: int(answer) for pair, answer in known.items() if answer is not None and answer in _GRADES}
        unfinished = {query_id for (query_id, _), answer in known.items() if answer is None}
        return judged(self.pool, grades, unfinished, origin=HUMAN, threshold=threshold)


def _shuffled(passage_ids: list[str], seed: str) -> list[str]:
    return random.Random(seed).sample(passage_ids, len(passage_ids))


def _walk(labelling: Labelling, ask: Callable[[str], str], show: Callable[[str], None]) -> None:
    """Ask for each pair without an answer."""
    pool = labelling.pool
    show(f"{RUBRIC}\n")
    while (pair := labelling.next()) is not None:
        number, place, count = labelling.place(pair)
        show(f"\nQuery {number} of {len(pool.queries)}: {printable(pool.queries[pair[0]])}")
        show(f"Passage {place} of {count}:\n{printable(pool.corpus[pair[1]])}\n")
        try:
            typed = ask(f"{_KEYS}: ").strip().lower()
        except EOFError:
            typed = _QUIT
        if typed == _QUIT:
            return
        if typed == UNDO:
            if not labelling.undo():
                show("There is nothing to undo.")
        elif not labelling.answer(pair, typed):
            show(f"Not understood: {typed!r:.40}.")


def read_answers(path: str | os.PathLike[str]) -> dict[Key, str]:
    """The answers in a file in their order, none of a file that is missing; creates the file's folder.

    Raises:
        DatasetError: The file holds something else.
        OSError: The folder cannot be created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size == 0:
        return {}
    answers: dict[Key, str] = {}
    try:
        lines = read_json_lines(path)
        for line in lines:
            key = (line["query"], line["text"])
            answers.pop(key, None)
            if line["answer"] != UNDO:
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
