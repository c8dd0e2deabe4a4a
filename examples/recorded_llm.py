"""Queries that an LLM wrote for Python's language reference, replayed from a journal without an LLM or network.

    generator = recorded_query_generator(Path("runs/demo"))
    engine = LoraFinetuneEngine.from_nodes(nodes, base, query_generators=[generator])

The journal has answers for about four topics in five (`has_queries`); the others are for evaluation on topics that a
model was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from llama_index.core.llms import CustomLLM, LLMMetadata
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import BaseNode

from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.data import GeneratedQuery, LLMQueryGenerator
from llama_index_lora_embed.data.llm.identity import digest
from llama_index_lora_embed.data.questions.base import embed_text

JOURNAL = Path(__file__).with_name("python_queries.journal.jsonl")
# The journal finds an answer by the text, this prompt and the LLM: after a change of the prompt there are no answers.
PROMPT = """\
Programmers search the reference of Python. They have not seen the text below, but it holds what they need.

{context_str}

Write up to {num_questions_per_chunk} search queries that this text answers and few other texts do, in the words of
somebody with a task or a problem, not in the words of the text. Kinds of query: question, keywords, paraphrase (a task
or a question that avoids the text's own words), conversational (as in a chat, also about an error), claim.

One query a line, its kind and a colon in front, nothing else.
"""


def has_queries(topic: str) -> bool:
    """Whether the journal has answers for a topic; a rule that looks at neither nodes nor queries decides."""
    return int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 5 != 0


class RecordedLLM(CustomLLM):
    """Stands for the LLM whose answers are in the journal, and can give no others."""

    @classmethod
    def class_name(cls) -> str:
        """Part of the journal's keys."""
        return "RecordedLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Its name, which is part of the journal's keys."""
        return LLMMetadata(model_name="recorded", context_window=8192)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> NoReturn:
        """Refuse, because nothing new can be answered."""
        raise LookupError(f"no recorded answer to the prompt {prompt[:80]!r}")

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> NoReturn:
        """Refuse, because nothing new can be answered."""
        self.complete(prompt)


class RecordedQueryGenerator(LLMQueryGenerator):
    """An `LLMQueryGenerator` for the nodes whose text the journal has an answer for; other nodes get no query."""

    async def agenerate(self, nodes: Sequence[BaseNode], *, seed: int = 0, wait: bool = False) -> list[GeneratedQuery]:
        """The queries of the nodes with an answer, without a call of the LLM."""
        with open(self.journal, encoding="utf-8") as lines:
            recorded = {json.loads(line).get("text") for line in lines}
        known = [node for node in nodes if digest(embed_text(node)) in recorded]
        return await super().agenerate(known, seed=seed, wait=wait)


def recorded_query_generator(folder: Path) -> RecordedQueryGenerator:
    """A generator that replays a copy of the journal in `folder`, so that the committed file stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    return RecordedQueryGenerator(
        llm=RecordedLLM(),
        num_queries=6,
        styles=("question", "keywords", "paraphrase", "conversational", "claim"),
        prompt=PromptTemplate(PROMPT),
        structured=False,
        journal=str(shutil.copy(JOURNAL, folder)),
        settings=LLMSettings(attempts=1, on_failure="continue", show_progress=False),
    )
