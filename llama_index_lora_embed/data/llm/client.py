"""Asking an LLM many things at once: bounded, retried, journalled, counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms import LLM
from llama_index.core.prompts import BasePromptTemplate
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential
from tqdm.auto import tqdm

from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.core.errors import LLMError, LoraEmbedError
from llama_index_lora_embed.data.llm.identity import digest, is_synchronous, llm_identity, usage
from llama_index_lora_embed.data.llm.journal import Journal

logger = logging.getLogger(__name__)
T = TypeVar("T")
Write = Callable[[dict[str, Any]], Awaitable[None]]
# Requests that must fail, with none answered, before a run is given up as a whole: a wrong key, no network.
_HOPELESS_AFTER = 8


@dataclass(frozen=True)
class Request:
    """One thing to ask.

    Attributes:
        template: The prompt.
        variables: What is filled into it.
        text_hash: Digest of the text that is asked about.
        settings: Whatever else decides the answer: number of questions, styles, ...
        output_cls: Pydantic class of the answer where the LLM is asked for structured output; None for plain text.
    """

    template: BasePromptTemplate
    variables: dict[str, Any]
    text_hash: str
    settings: str = ""
    output_cls: type[BaseModel] | None = None


@dataclass(frozen=True)
class LLMReport:
    """What was asked and what came of it. Sums over a journal's earlier runs are not in it.

    Attributes:
        requests: Calls made, repeated ones included.
        answered: Requests with a usable answer from this run.
        from_journal: Requests that were answered before.
        refused: Calls whose answer held nothing usable (empty, refusals, noise).
        errors: Calls that raised or timed out.
        given_up: Requests without a usable answer after all attempts.
        prompt_tokens: As far as the LLM tells.
        completion_tokens: As far as the LLM tells.
        stopped: Why the run stopped before its end, or "".
    """

    requests: int = 0
    answered: int = 0
    from_journal: int = 0
    refused: int = 0
    errors: int = 0
    given_up: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stopped: str = ""

    def __str__(self) -> str:
        text = (
            f"{self.answered} answered with {self.requests} calls ({self.refused} unusable answers, {self.errors} "
            f"errors), {self.from_journal} from the journal, {self.given_up} given up; "
            f"{self.prompt_tokens} + {self.completion_tokens} tokens as far as the LLM told"
        )
        return f"{text}; stopped: {self.stopped}" if self.stopped else text


class _RefusedError(Exception):
    """The LLM answered, and nothing in it can be used."""


class LLMClient:
    """Asks an LLM requests, as many at once as the settings allow, and keeps every answer in a journal.

    An answer counts when the journal has it on disk; a request whose answer the journal has is not made again.
    Answers with nothing usable in them are journalled too, because they were paid for: they count as attempts in
    later runs. The LLM's own `rate_limiter` is honoured. An LLM without asynchronous methods of its own is called in
    threads, and its calls have no timeout: a thread cannot be stopped.

    Args:
        llm: Any LlamaIndex LLM.
        journal: Open journal.
        settings: Bounds.
        usable: Tells from an answer's text whether there is anything in it.
    """

    def __init__(self, llm: LLM, journal: Journal, settings: LLMSettings, usable: Callable[[str], bool]) -> None:
        self.llm = llm
        self.journal = journal
        self.settings = settings
        self.usable = usable
        self.identity = llm_identity(llm)
        self.synchronous = is_synchronous(llm)
        self.in_flight = settings.in_flight or (1 if self.synchronous else 32)
        self.report = LLMReport()
        self._asking: set[str] = set()
        self._fruitless = 0  # requests of this run that got nothing usable
        # Its limiter is waited for here, so that the wait is not taken for a slow answer.
        self._limiter = llm.rate_limiter
        self._caller = llm if self._limiter is None else llm.model_copy(update={"rate_limiter": None})

    def key(self, request: Request) -> str:
        """What a request is journalled under: a digest of text, prompt, LLM and settings."""
        # partially filled templates and functions are part of the prompt, so it is hashed as it will be sent
        blank = {**request.variables, "context_str": ""}
        prompt = request.template.format(llm=self.llm, **blank)
        parts = [request.text_hash, digest(prompt), self.identity, request.settings]
        return digest("\0".join(parts))

    def answer(self, request: Request) -> str | None:
        """The journalled answer, or None."""
        record = self.journal.get(self.key(request))
        return None if record is None else record.get("answer")

    async def complete_all(self, requests: Iterable[Request], total: int | None = None) -> LLMReport:
        """Ask what is not yet answered.

        Args:
            requests: Read one by one, as workers become free.
            total: Their number, for the progress bar.

        Raises:
            LLMError: The first requests all failed; or one did, and `on_failure` is "fail".
            JournalError: An answer could not be written.
        """
        queue = iter(requests)
        with tqdm(total=total, desc="Asking the LLM", disable=not self.settings.show_progress, unit="node") as bar:
            async with self._journal_writer() as write:
                workers = [asyncio.create_task(self._work(queue, write, bar)) for _ in range(self.in_flight)]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
        if self.report.stopped:
            logger.warning("asking stopped early: %s", self.report.stopped)
        return self.report

    async def _work(self, queue: Iterator[Request], write: Write, bar: Any) -> None:
        for request in queue:
            if self.report.stopped:
                return
            key = self.key(request)
            if key in self.journal:
                self._count(from_journal=1)
            elif key not in self._asking:  # the same text twice is asked about once
                self._asking.add(key)
                try:
                    await self._ask(request, key, write)
                finally:
                    self._asking.discard(key)
            bar.update()

    async def _ask(self, request: Request, key: str, write: Write) -> None:
        left = self.settings.attempts - self.journal.refusals(key)
        if left <= 0:
            self._give_up(_RefusedError(f"{self.settings.attempts} unusable answers in earlier runs"))
            return
        retrying = AsyncRetrying(
            stop=stop_after_attempt(left),
            wait=wait_random_exponential(multiplier=self.settings.backoff, max=self.settings.max_backoff),
            retry=retry_if_exception(_worth_retrying),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    if self._bound_reached():
                        return
                    # an LLM that fails at structured output may still write plain lines
                    plain = attempt.retry_state.attempt_number > (left + 1) // 2
                    await self._once(replace(request, output_cls=None) if plain else request, key, write)
        except LoraEmbedError:
            raise
        except Exception as error:
            self._give_up(error)

    async def _once(self, request: Request, key: str, write: Write) -> None:
        if self._limiter is not None:
            await self._limiter.async_acquire()
        self._count(requests=1)
        call = asyncio.ensure_future(self._call(request))
        try:
            if self.synchronous:  # a thread cannot be stopped; what it brings home late was paid for as well
                text, tokens = await asyncio.shield(call)
            else:
                text, tokens = await asyncio.wait_for(call, self.settings.timeout)
        except asyncio.CancelledError:
            if self.synchronous:
                with contextlib.suppress(Exception):
                    await self._keep(request, key, write, *await call)
            raise
        except Exception:
            self._count(errors=1)
            raise
        answer, ok = await self._keep(request, key, write, text, tokens)
        if not ok:
            self._count(refused=1)
            raise _RefusedError(f"nothing usable in the answer {answer[:80]!r}")
        self._count(answered=1)

    async def _keep(
        self, request: Request, key: str, write: Write, text: Any, usage: dict[str, int]
    ) -> tuple[str, bool]:
        """Journal an answer; returns it and whether it is usable."""
        self._count(**usage)
        answer = text if isinstance(text, str) else repr(text)
        try:
            ok = isinstance(text, str) and self.usable(text)
        except Exception:  # whatever it stumbled over, the answer was paid for and is to be kept
            ok = False
        record = {"key": key, "ok": ok, "answer": answer, **usage}
        await write({**record, "text": request.text_hash, "llm": self.identity, "settings": request.settings})
        return answer, ok

    async def _call(self, request: Request) -> tuple[Any, dict[str, int]]:
        """One call; returns (text, tokens). Prompts are wrapped as the LLM's own `predict` wraps them."""
        llm: Any = self._caller
        if request.output_cls is not None:
            value = await llm.astructured_predict(request.output_cls, request.template, **request.variables)
            return (value.model_dump_json() if isinstance(value, BaseModel) else value), {}
        if llm.metadata.is_chat_model:
            messages = llm._get_messages(request.template, **request.variables)
            response = await (asyncio.to_thread(llm.chat, messages) if self.synchronous else llm.achat(messages))
            text = getattr(getattr(response, "message", None), "content", None)
        else:
            prompt = llm._get_prompt(request.template, **request.variables)
            complete = partial(llm.complete if self.synchronous else llm.acomplete, prompt, formatted=True)
            response = await (asyncio.to_thread(complete) if self.synchronous else complete())
            text = getattr(response, "text", None)
        return (response if text is None else text), usage(response)

    def _count(self, **more: int) -> None:
        self.report = replace(self.report, **{name: getattr(self.report, name) + n for name, n in more.items()})

    def _bound_reached(self) -> bool:
        tokens = self.report.prompt_tokens + self.report.completion_tokens
        for name, bound, used in (
            ("max_requests", self.settings.max_requests, self.report.requests),
            ("max_tokens", self.settings.max_tokens, tokens),
        ):
            if bound is not None and used >= bound:
                self.report = replace(self.report, stopped=f"{name}={bound} is reached")
        return bool(self.report.stopped)

    def _give_up(self, error: Exception) -> None:
        """Count a request that got no usable answer; raise where the run is to end with it."""
        self._count(given_up=1)
        logger.info("a request was given up: %s", error)
        # nodes that an LLM refuses are no reason to doubt it where it answered others, now or in earlier runs
        known = isinstance(error, _RefusedError) and (self.report.from_journal or self.report.refused == 0)
        self._fruitless += 0 if known else 1
        if self.settings.on_failure == "fail" or (self.report.answered == 0 and self._fruitless >= _HOPELESS_AFTER):
            raise LLMError(
                f"no usable answer from {self.llm.class_name()} to {self.report.given_up} request(s), the last with "
                f"{type(error).__name__}: {error}",
                "answers to questions about nodes",
                "Check its key, its address and its model name. Answers that the journal has are kept.",
            ) from error

    @asynccontextmanager
    async def _journal_writer(self) -> AsyncIterator[Write]:
        """A function that returns when its record is on disk; records that come together share one sync."""
        waiting: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        wake, closing = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        async def write(record: dict[str, Any]) -> None:
            done: asyncio.Future[None] = loop.create_future()
            waiting.append((record, done))
            wake.set()
            await asyncio.shield(done)

        def settle(batch: list[tuple[dict[str, Any], asyncio.Future[None]]], error: Exception | None) -> None:
            for _, done in batch:
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)
                    done.exception()  # seen, though its worker may be gone

        async def serve() -> None:
            while waiting or not closing.is_set():
                await wake.wait()
                wake.clear()
                batch, waiting[:] = waiting[:], []
                try:
                    await asyncio.to_thread(self.journal.append, [record for record, _ in batch])
                    settle(batch, None)
                except Exception as error:
                    settle(batch, error)

        server = asyncio.create_task(serve())
        try:
            yield write
        finally:  # what came in while the run was being stopped is written too
            closing.set()
            wake.set()
            await asyncio.shield(server)


def _worth_retrying(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, LoraEmbedError)
