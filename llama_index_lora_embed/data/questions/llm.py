"""Questions written by an LLM, and questions judged by one."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from llama_index.core.bridge.pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    field_validator,
)
from llama_index.core.llms import LLM
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.schema import BaseNode, MetadataMode

from llama_index_lora_embed.config import JOURNAL_NAME, LLMSettings
from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, JournalInUseError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.filters.language import detect
from llama_index_lora_embed.data.llm.client import LLMClient, LLMReport, Request
from llama_index_lora_embed.data.llm.identity import digest
from llama_index_lora_embed.data.llm.journal import Journal
from llama_index_lora_embed.data.questions.base import GeneratedQuery, NodeQueryGenerator, attach_queries, embed_text
from llama_index_lora_embed.data.questions.parsing import parse_queries, strip_thoughts
from llama_index_lora_embed.data.questions.prompts import JUDGE_PROMPT, STYLES, search_prompt, style_variables

# What providers refuse in a request: control characters, and the halves of characters that broken readers leave.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


_POLL_SECONDS = 0.1


class SearchQuery(BaseModel):
    """One search query."""

    style: str = Field(description="The kind of query.")
    query: str = Field(description="The query as a user would type it.")


class SearchQueries(BaseModel):
    """Search queries that a text answers."""

    queries: list[SearchQuery] = Field(description="The queries, as many as asked for.")


class LLMQueryGenerator(NodeQueryGenerator):
    """An LLM writes search queries that each node answers.

    Many requests are under way at once; each answer is in the journal, on disk, before it counts. Started again
    after an interruption, or on a corpus that has changed in part, only nodes without an answer are asked about:
    answers belong to a node's text, the prompt, the LLM and the settings, not to its id or place. The questions
    come in the order of the nodes, however the answers came.

    The styles go round from node to node, so that with two questions a node and four styles each style gets its
    share. The prompt is in the node's language where there is one in it.

    Args:
        llm: Any LlamaIndex LLM. Its `rate_limiter` is honoured.
        num_questions: Questions for each node.
        styles: Kinds of query: "question", "keywords", "paraphrase" (without the text's words), "conversational".
        prompt: A template of your own with {context_str} and {num_questions_per_chunk}; None for the search
            prompt. `prompts.EXAM_PROMPT` asks for exam questions.
        structured: Ask for structured output; None where the LLM calls functions and no `max_tokens` is set. After
            half the attempts failed, plain lines are asked for.
        journal: Where answers are kept. The same file may serve several runs, one after the other.
        settings: How the LLM is asked.

    Raises:
        ConfigError: Arguments are wrong.

    Example:
        >>> generator = LLMQueryGenerator(llm=llm, journal="runs/questions.jsonl")  # doctest: +SKIP
        >>> engine = LoraFinetuneEngine.from_nodes(nodes, query_generators=[generator])  # doctest: +SKIP
    """

    llm: SerializeAsAny[LLM] = Field(description="The LLM that writes the questions.")
    num_questions: int = Field(default=2, ge=1, description="Questions for each node.")
    styles: tuple[str, ...] = Field(default=tuple(STYLES["en"]), description="Kinds of query.")
    prompt: SerializeAsAny[BasePromptTemplate] | None = Field(default=None, description="A template of your own.")
    structured: bool | None = Field(default=None, description="Ask for structured output.")
    journal: str = Field(default=JOURNAL_NAME, description="File in which answers are kept.")
    settings: LLMSettings = Field(default_factory=LLMSettings, description="How the LLM is asked.")
    name: ClassVar[str] = "llm"

    _report: LLMReport = PrivateAttr(default_factory=LLMReport)

    def __init__(self, **kwargs: Any) -> None:
        if isinstance(kwargs.get("prompt"), str):
            kwargs["prompt"] = PromptTemplate(kwargs["prompt"])
        problems = [f"{name}: no such argument" for name in sorted(kwargs.keys() - type(self).model_fields.keys())]
        if not isinstance(kwargs.get("llm"), LLM):
            problems.append(f"llm={kwargs.get('llm')!r:.60}: expected a LlamaIndex LLM")
        try:
            if not problems:
                super().__init__(**kwargs)
                problems = self._problems()
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        if problems:
            raise ConfigError(f"{len(problems)} unusable argument(s)", "the values below", "Correct them:", problems)

    def _problems(self) -> list[str]:
        problems = []
        if self.prompt is not None and "context_str" not in self.prompt.template_vars:
            problems.append("prompt without {context_str}: expected a template that shows the node's text")
        if not self.styles or not set(self.styles) <= STYLES["en"].keys():
            problems.append(f"styles={self.styles!r}: expected some of {sorted(STYLES['en'])}")
        if self.structured and self.settings.max_tokens is not None:
            problems.append(
                "structured=True with max_tokens: expected one of them, as structured answers tell no tokens"
            )
        return problems

    @field_validator("journal", mode="before")
    @classmethod
    def _absolute(cls, path: Any) -> str:
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"expected a path, got {path!r}")
        return os.path.abspath(os.path.expanduser(os.fspath(path)))  # another working directory finds the same file

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises it."""
        return "LLMQueryGenerator"

    @property
    def report(self) -> LLMReport:
        """What the last run asked, and what it cost."""
        return self._report

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Ask about every node with text; yield its questions in the order of the nodes.

        Raises:
            LLMError: The LLM fails altogether, or for one node where `on_failure` is "fail".
            JournalError: The journal cannot be used.
        """
        return iter(run_async(self.agenerate(nodes, seed=seed)))

    async def agenerate(self, nodes: Sequence[BaseNode], *, seed: int = 0, wait: bool = False) -> list[GeneratedQuery]:
        """As `generate`, for callers that are asynchronous themselves.

        Args:
            nodes: Nodes to ask about.
            seed: Changes nothing: an LLM's chance is its own.
            wait: Wait for another run that has the journal open instead of raising.
        """
        structured = self.structured
        if structured is None:
            structured = self.llm.metadata.is_function_calling_model and self.settings.max_tokens is None
        with await _opened(self.journal, wait) as journal:
            asker = LLMClient(self.llm, journal, self.settings, lambda text: bool(parse_queries(text)))
            try:
                await asker.complete_all(
                    (self._request(n, structured) for n in nodes if _has_text(n)), total=len(nodes)
                )
            finally:
                self._report = asker.report
            return list(self._questions(nodes, asker, structured))

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Attach questions to the nodes; workers of a pipeline take turns at the journal."""
        return attach_queries(nodes, run_async(self.agenerate(nodes, wait=True)))

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As calling it, without blocking."""
        return attach_queries(nodes, await self.agenerate(nodes, wait=True))

    def _request(self, node: BaseNode, structured: bool) -> Request:
        text = _CONTROL.sub(" ", embed_text(node))
        text_hash = digest(text)
        start = int(text_hash[:8], 16) % len(self.styles)
        styles = tuple(
            self.styles[(start + i) % len(self.styles)] for i in range(min(self.num_questions, len(self.styles)))
        )
        language = detect(text)
        variables: dict[str, Any] = {
            "context_str": _cut(text, self.llm),
            "num_questions_per_chunk": self.num_questions,
        }
        if self.prompt is None:
            variables |= style_variables(styles, language, self.num_questions)
        return Request(
            template=self.prompt or search_prompt(language),
            variables=variables,
            text_hash=text_hash,
            settings="structured" if structured else "text",
            output_cls=SearchQueries if structured else None,
        )

    def _questions(self, nodes: Sequence[BaseNode], asker: LLMClient, structured: bool) -> Iterator[GeneratedQuery]:
        for node in nodes:
            if not _has_text(node) or (answer := asker.answer(self._request(node, structured))) is None:
                continue
            for question in parse_queries(answer, self.num_questions):
                style = f"/{question.style}" if question.style else ""
                yield GeneratedQuery(question.text, node.node_id, f"{self.name}{style}")


def judge_queries(
    dataset: EmbeddingQAFinetuneDataset,
    llm: LLM,
    *,
    origins: Iterable[str] | None = None,
    journal: str | os.PathLike[str] = JOURNAL_NAME,
    settings: LLMSettings | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, LLMReport, list[str]]:
    """Let an LLM judge whether passages answer their questions; drop the questions whose passage does not.

    Args:
        dataset: Checked dataset.
        llm: Any LlamaIndex LLM.
        origins: Judge questions of these origins only; None judges those that an LLM wrote ("llm...").
        journal: Where its answers are kept; a question that was judged before is not judged again.
        settings: How the LLM is asked.

    Returns:
        The dataset without them, what was asked, and the ids of the dropped questions. A question without a
        usable verdict stays.

    Raises:
        LLMError: The LLM fails altogether.
        JournalError: The journal cannot be used.
    """
    wanted = None if origins is None else set(origins)
    judged = [
        i
        for i, origin in ((i, (dataset.query_origins or {}).get(i, "")) for i in dataset.queries)
        if (origin.startswith("llm") if wanted is None else origin in wanted)
    ]

    def request(query_id: str) -> Request:
        passage = _CONTROL.sub(" ", dataset.corpus[dataset.relevant_docs[query_id][0]])
        variables = {"context_str": _cut(passage, llm), "query_str": dataset.queries[query_id]}
        return Request(PromptTemplate(JUDGE_PROMPT), variables, digest(passage), "judge")

    with Journal(journal) as opened:
        asker = LLMClient(llm, opened, settings or LLMSettings(), lambda text: _verdict(text) is not None)
        report = run_async(asker.complete_all((request(i) for i in judged), total=len(judged)))
        dropped = [i for i in judged if _verdict(asker.answer(request(i)) or "") is False]
    gone = set(dropped)
    return dataset.subset((i for i in dataset.queries if i not in gone), dataset.corpus), report, dropped


def _verdict(answer: str) -> bool | None:
    """Yes or no: the first word of an answer, or the only one of its kind in it; None where it is neither."""
    words = re.findall(r"\w+", strip_thoughts(answer).lower())
    said = [word for word in words if word in ("yes", "no")]
    if words[:1] == said[:1] and not (len(words) > 1 and {*words[:2]} == {"yes", "no"}):
        return said[0] == "yes" if said else None
    return said[0] == "yes" if len(said) == 1 and words[-1:] == said else None


async def _opened(path: str, wait: bool) -> Journal:
    """The journal; where another run has it open, polled for until that is done, or refused."""
    while True:
        try:
            return Journal(path)
        except JournalInUseError:
            if not wait:
                raise
        await asyncio.sleep(_POLL_SECONDS)


def _has_text(node: BaseNode) -> bool:
    return bool(node.get_content(metadata_mode=MetadataMode.NONE).strip())


def _cut(text: str, llm: LLM) -> str:
    """As much of a text as surely fits the LLM's context window beside the prompt and the answer.

    Without the LLM's tokenizer a token is taken for three characters, or for one outside ASCII: English has four.
    """
    room = max(256, llm.metadata.context_window - max(llm.metadata.num_output, 0) - 512)
    if len(text) <= room:
        return text
    spent = 0.0
    for place, character in enumerate(text):
        spent += 1 / 3 if character.isascii() else 1
        if spent > room:
            return text[:place]
    return text
