"""Nodes and queries without labels, and an LLM that grades by the words that query and passage share."""

from __future__ import annotations

import os

from llama_index.core.schema import TextNode

from llama_index_lora_embed.evaluation import judge_queries
from tests.conftest import make_dataset
from tests.helpers.evaluation import WordCountEmbedding
from tests.helpers.llms import FAST, FakeLLM

DATASET = make_dataset(questions=1)
NODES = [TextNode(text=text, id_=passage_id, metadata={}) for passage_id, text in DATASET.corpus.items()]
QUERIES = list(DATASET.queries.values())


def models():
    return {"base": WordCountEmbedding(dimensions=12), "tuned": WordCountEmbedding()}


def query_of(prompt):
    return prompt.split("Search query: ")[1].split("\n")[0]


def passage_of(prompt):
    return prompt.split("---\n")[1].rsplit("\n", 1)[0]


class Judge(FakeLLM):
    """Grades a passage by the number of words of the query in it, at most 3; logs each answer to a file first.

    After `dies_after` answers the process ends at once.
    """

    log: str = ""
    dies_after: int | None = None

    def answer(self, prompt):
        self.prompts.append(prompt)
        self.calls += 1
        if self.dies_after is not None and self.calls > self.dies_after:
            os._exit(9)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{query_of(prompt)}\t{passage_of(prompt)}\n")
        return self.grade(query_of(prompt), passage_of(prompt))

    def grade(self, query, passage):
        return str(min(3, len(set(query.split()) & set(passage.split()))))


def judged(llm, journal, queries=QUERIES, nodes=NODES, pool=None, **kwargs):
    """`judge_queries` with the helpers' nodes and models."""
    return judge_queries(
        queries, nodes, models() if pool is None else pool, llm, journal=journal, **{"settings": FAST, **kwargs}
    )
