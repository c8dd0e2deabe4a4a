"""Queries written by an LLM, and an LLM as the judge of queries."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

from llama_index.core.llms import LLM
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.schema import BaseNode, MetadataMode
from pydantic import AfterValidator, BaseModel, Field, PrivateAttr, SerializeAsAny, field_validator, model_validator

from llama_index_lora_embed.config import JOURNAL_NAME, LLMSettings
from llama_index_lora_embed.config.base import AtLeast1, PathText
from llama_index_lora_embed.core.concurrency import run_async
from llama_index_lora_embed.core.errors import ConfigError, JournalInUseError
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.filters.language import detect
from llama_index_lora_embed.data.llm.client import LLMClient, LLMReport, Request
from llama_index_lora_embed.data.llm.identity import digest
from llama_index_lora_embed.data.llm.journal import Answers, Journal
from llama_index_lora_embed.data.llm.passages import printable, truncate
from llama_index_lora_embed.data.origins import LLM_WRITTEN
from llama_index_lora_embed.data.questions.base import GeneratedQuery, NodeQueryGenerator, attach_queries, embed_text
from llama_index_lora_embed.data.questions.parsing import ParsedQuery, parse_queries, strip_reasoning
from llama_index_lora_embed.data.questions.prompts import JUDGE_PROMPT, STYLES, Style, search_prompt


class SearchQuery(BaseModel):
    """One search query."""

    style: str = Field(description="The kind of query.")
    query: str = Field(description="The query as a user would type it.")


class SearchQueries(BaseModel):
    """Search queries that a text answers."""

    queries: list[SearchQuery] = Field(description="The queries, as many as asked for.")


class LLMQueryGenerator(NodeQueryGenerator):
    """An LLM writes search queries that each node answers.

    Many requests are in flight at once, and each answer is in the journal, on disk, before it counts. After an
    interruption, or when the corpus has changed in part, only nodes without an answer are sent to the LLM: answers
    belong to a node's text, the prompt, the LLM and the settings, not to its id or position. Queries come in the order
    of the nodes, whatever the order of the answers.

    The styles rotate from node to node, so that with two queries for each node and four styles all styles are used
    equally. A query's origin is "llm/<style>". The prompt is in the node's language if there is one in it.

    Example:
        >>> generator = LLMQueryGenerator(llm, journal="runs/queries.jsonl")  # doctest: +SKIP
        >>> engine = LoraFinetuneEngine.from_nodes(nodes, query_generators=[generator])  # doctest: +SKIP
    """

    llm: SerializeAsAny[LLM]
    """Any LlamaIndex LLM; its `rate_limiter` is honoured."""
    num_queries: AtLeast1 = 2
    """Queries for each node."""
    styles: Annotated[tuple[Style, ...], Field(min_length=1)] = STYLES
    """Kinds of query; a "paraphrase" avoids the text's own words. "claim" and "title" are for users who search with
    statements or titles. Training on several kinds was better than on any one of them, whichever kind was evaluated
    (arXiv 2505.19274)."""
    prompt: SerializeAsAny[BasePromptTemplate] | None = None
    """A template with {context_str} and {num_questions_per_chunk}, also as text; None for the search prompt.
    `prompts.EXAM_PROMPT` asks for exam questions."""
    structured: bool | None = None
    """Request structured output; None where the LLM calls functions and no `max_tokens` is set. After half of the
    attempts have failed, plain lines are requested."""
    journal: Annotated[PathText, AfterValidator(lambda path: os.path.abspath(os.path.expanduser(path)))] = Field(
        default=JOURNAL_NAME, validate_default=True
    )
    """File in which answers are kept. Several runs can use it, one after the other. The path is made absolute, so that
    workers in another working directory find the same file."""
    settings: LLMSettings = Field(default_factory=LLMSettings)
    """Concurrency, retries, and limits."""
    name: ClassVar[str] = LLM_WRITTEN

    _report: LLMReport = PrivateAttr(default_factory=LLMReport)
    _open_answers: Answers | None = PrivateAttr(default=None)

    def __init__(self, llm: LLM, **kwargs: Any) -> None:
        super().__init__(llm=llm, **kwargs)

    @field_validator("llm", mode="before")
    @classmethod
    def _is_llm(cls, llm: Any) -> Any:
        if not isinstance(llm, LLM):
            raise ValueError(f"expected a LlamaIndex LLM, got {llm!r:.60}")
        return llm

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_template(cls, prompt: Any) -> Any:
        template = PromptTemplate(prompt) if isinstance(prompt, str) else prompt
        if isinstance(template, BasePromptTemplate) and "context_str" not in template.template_vars:
            raise ValueError("expected a template with {context_str}, which shows the node's text")
        return template

    @model_validator(mode="after")
    def _can_count_tokens(self) -> LLMQueryGenerator:
        if self.structured and self.settings.max_tokens is not None:
            raise ValueError(
                "structured=True with max_tokens: expected one of them, because structured answers have no token count"
            )
        return self

    @property
    def report(self) -> LLMReport:
        """The requests of the last run and their results."""
        return self._report

    def use_journal(self, journal: Answers | None) -> None:
        """Keep answers in a journal that is open already, for example in another process; None opens `journal`."""
        self._open_answers = journal

    def generate(self, nodes: Sequence[BaseNode], *, seed: int = 0) -> Iterator[GeneratedQuery]:
        """Yield queries for every node with text, in the order of the nodes; the seed has no effect.

        Raises:
            LLMError: The LLM fails altogether, or for one node where `on_failure` is "fail".
            JournalError: The journal cannot be used.
        """
        return iter(run_async(self.agenerate(nodes, seed=seed)))

    async def agenerate(self, nodes: Sequence[BaseNode], *, seed: int = 0, wait: bool = False) -> list[GeneratedQuery]:
        """The asynchronous `generate`; with `wait`, it waits for another run that has the journal open."""
        nodes = [node for node in nodes if node.get_content(metadata_mode=MetadataMode.NONE).strip()]
        structured = self.structured
        if structured is None:
            structured = self.llm.metadata.is_function_calling_model and self.settings.max_tokens is None
        with self._open_answers or await _open_journal(self.journal, wait) as journal:
            client = LLMClient(self.llm, journal, self.settings, lambda text: bool(self._parse(text)))
            try:
                await client.complete_all((self._request(node, structured) for node in nodes), total=len(nodes))
            finally:
                self._report = client.report
            return [
                GeneratedQuery(query.text, node.node_id, f"{self.name}/{query.style}" if query.style else self.name)
                for node in nodes
                for query in self._parse(client.answer(self._request(node, structured)))
            ]

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Attach queries to the nodes; the workers of a pipeline take turns with the journal."""
        return attach_queries(nodes, run_async(self.agenerate(nodes, wait=True)))

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The asynchronous `__call__`."""
        return attach_queries(nodes, await self.agenerate(nodes, wait=True))

    def _parse(self, answer: str | None) -> list[ParsedQuery]:
        return parse_queries(answer, self.num_queries, self.styles)

    def _request(self, node: BaseNode, structured: bool) -> Request:
        text = printable(embed_text(node))
        text_hash = digest(text)
        start = int(text_hash[:8], 16) % len(self.styles)
        styles = (*self.styles[start:], *self.styles[:start])[: self.num_queries]
        return Request(
            template=self.prompt or search_prompt(styles, self.num_queries, detect(text)),
            variables={"context_str": truncate(text, self.llm), "num_questions_per_chunk": self.num_queries},
            text_hash=text_hash,
            settings="structured" if structured else "text",
            output_cls=SearchQueries if structured else None,
            name=node.node_id,
        )


def drop_unanswered_queries(
    dataset: EmbeddingQAFinetuneDataset,
    llm: LLM,
    *,
    origins: str | Iterable[str] | None = None,
    journal: str | os.PathLike[str] = JOURNAL_NAME,
    settings: LLMSettings | None = None,
) -> tuple[EmbeddingQAFinetuneDataset, LLMReport, list[str]]:
    """Ask an LLM whether passages answer their queries; drop the queries whose passage does not.

    Args:
        dataset: Checked dataset.
        llm: Any LlamaIndex LLM.
        origins: Origin or origins of the queries to judge; None for the LLM-written ones ("llm...").
        journal: Where its answers are kept; a query is not judged twice.
        settings: Concurrency, retries, and limits.

    Returns:
        The remaining dataset, the report on the requests, and the ids of the dropped queries. A query without a usable
        verdict stays.

    Raises:
        ConfigError: `llm` is not a LlamaIndex LLM.
        LLMError: The LLM fails altogether.
        JournalError: The journal cannot be used.
    """
    if not isinstance(llm, LLM):
        raise ConfigError(f"llm={llm!r:.60}", "a LlamaIndex LLM", "Pass for example llm=Settings.llm.")
    if origins is None:
        origins = [origin for origin in dataset.origins() if origin.partition("/")[0] == LLM_WRITTEN]
    wanted = {origins} if isinstance(origins, str) else set(origins)
    origin_of = dataset.query_origins or {}
    judged = [query_id for query_id in dataset.queries if origin_of.get(query_id, "") in wanted]

    def request(query_id: str) -> Request:
        passage = printable(dataset.corpus[dataset.relevant_docs[query_id][0]])
        variables = {"context_str": truncate(passage, llm), "query_str": dataset.queries[query_id]}
        return Request(PromptTemplate(JUDGE_PROMPT), variables, digest(passage), "judge", name=query_id)

    with Journal(journal) as opened:
        client = LLMClient(llm, opened, settings or LLMSettings(), lambda text: _verdict(text) is not None)
        report = run_async(client.complete_all((request(i) for i in judged), total=len(judged)))
        dropped = {i: None for i in judged if _verdict(client.answer(request(i)) or "") is False}
    return dataset.subset((i for i in dataset.queries if i not in dropped), dataset.corpus), report, list(dropped)


def _verdict(answer: str) -> bool | None:
    """Whether the answer's first word is yes or no, or else its last word if it is the only one; None if neither."""
    words = re.findall(r"\w+", strip_reasoning(answer).lower())
    verdicts = [word for word in words if word in ("yes", "no")]
    if not verdicts or {*words[:2]} == {"yes", "no"}:
        return None
    first, only_last = words[0] == verdicts[0], words[-1:] == verdicts
    return verdicts[0] == "yes" if first or only_last else None


async def _open_journal(path: str, wait: bool) -> Journal:
    """The journal; if another run has it open, wait for that run or raise."""
    while True:
        try:
            return Journal(path)
        except JournalInUseError:
            if not wait:
                raise
        await asyncio.sleep(0.1)
