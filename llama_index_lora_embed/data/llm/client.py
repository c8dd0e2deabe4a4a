"""Many requests to an LLM: a bounded number at a time, retried, journalled, counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms import LLM
from llama_index.core.prompts import BasePromptTemplate
from tqdm.auto import tqdm

from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.core.errors import LLMError, LoraEmbedError
from llama_index_lora_embed.data.llm.identity import digest, is_synchronous, llm_identity, usage
from llama_index_lora_embed.data.llm.journal import Answers

logger = logging.getLogger(__name__)
# A run ends when so many requests failed and none was answered: the key is wrong, or there is no network.
_MAX_FAILURES_WITHOUT_ANSWER = 8
_NAMED = 10  # requests named in a report


@dataclass(frozen=True)
class Request:
    """A prompt for the LLM."""

    template: BasePromptTemplate
    variables: dict[str, Any]
    text_hash: str
    """Digest of the text that the prompt is about."""
    settings: str
    """What else decides the answer, for the journal's key."""
    output_cls: type[BaseModel] | None = None
    """Class of a structured answer; None for plain text."""
    name: str = ""
    """What it is about, for the report: the id of a node."""


@dataclass(frozen=True)
class LLMReport:
    """Requests and their results in one run; earlier runs with the same journal are not included.

    Attributes:
        requests: Calls made, retries included.
        answered: Requests that got a usable answer in this run.
        from_journal: Requests that an earlier run had answered.
        unusable: Calls whose answer held nothing usable (empty, refusals, noise).
        errors: Calls that raised or timed out.
        given_up: Requests without a usable answer after all attempts; the next run takes them up.
        prompt_tokens: Tokens of the prompts, as far as the LLM reports them.
        completion_tokens: Tokens of the answers, as far as the LLM reports them.
        stopped: Why the run stopped early, or "".
        unanswered: Names of the requests that were given up: ids of nodes.
    """

    requests: int = 0
    answered: int = 0
    from_journal: int = 0
    unusable: int = 0
    errors: int = 0
    given_up: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stopped: str = ""
    unanswered: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(self.unanswered[:_NAMED]) + (", ..." if len(self.unanswered) > _NAMED else "")
        given_up = f"{self.given_up} given up" + (f" for this run ({names})" if names else "")
        text = (
            f"{self.answered} answered with {self.requests} calls ({self.unusable} unusable answers, {self.errors} "
            f"errors), {self.from_journal} from the journal, {given_up}; "
            f"{self.prompt_tokens} + {self.completion_tokens} tokens as far as the LLM reported them"
        )
        return f"{text}; stopped: {self.stopped}" if self.stopped else text


class _UnusableAnswerError(Exception):
    """The LLM answered, with nothing usable in it."""


class LLMClient:
    """Sends requests to an LLM, as many at a time as the settings allow, and keeps every answer in a journal.

    An answer counts once the journal has it on disk; a request that the journal has an answer to is not sent again.
    Requests without an answer are sent once more at the end of a run, and in the next one. Unusable answers are
    journalled too, because they were paid for: they count as attempts, beyond which each pass makes one, and none after
    twice as many. The LLM's own `rate_limiter` is honoured. An LLM without asynchronous methods of its own is called in
    threads and without a timeout, because a thread cannot be stopped. `is_usable` tells whether the text of an answer
    holds anything usable.
    """

    def __init__(self, llm: LLM, journal: Answers, settings: LLMSettings, is_usable: Callable[[str], bool]) -> None:
        self.llm = llm
        self.journal = journal
        self.settings = settings
        self.is_usable = is_usable
        self.identity = llm_identity(llm)
        self.synchronous = is_synchronous(llm)
        self.in_flight = settings.in_flight or (1 if self.synchronous else 32)
        self.report = LLMReport()
        self._requested: set[str] = set()
        self._failed: list[Request] = []
        self._failures = 0
        self._answers = False  # even before the first answer is on disk
        self._unwritten: list[dict[str, Any]] = []
        self._writing = asyncio.Lock()
        # The client itself waits for the rate limiter, so that the wait does not count as a slow answer.
        self._limiter = llm.rate_limiter
        self._unlimited_llm = llm if self._limiter is None else llm.model_copy(update={"rate_limiter": None})

    def key(self, request: Request) -> str:
        """The journal's key of a request: a digest of text, prompt, LLM and settings."""
        # The prompt is hashed as it will be sent, partially filled variables and functions included.
        prompt = request.template.format(llm=self.llm, **{**request.variables, "context_str": ""})
        return digest("\0".join([request.text_hash, digest(prompt), self.identity, request.settings]))

    def answer(self, request: Request) -> str | None:
        """The journalled answer, or None."""
        record = self.journal.get(self.key(request))
        return None if record is None else record.get("answer")

    async def complete_all(self, requests: Iterable[Request], total: int) -> LLMReport:
        """Send the requests that have no journalled answer; they are read one by one as workers become free.

        Raises:
            LLMError: The first requests all failed; or one did, and `on_failure` is "fail".
            JournalError: An answer could not be written.
        """
        try:
            with tqdm(total=total, desc="LLM requests", disable=not self.settings.show_progress, unit="node") as bar:
                await self._in_flight(partial(self._work, iter(requests), bar))
            await self._in_flight(partial(self._work_again, iter(self._failed[:])))
        finally:
            await asyncio.shield(self._flush())  # answers that arrived while the run was being stopped
            unanswered = tuple(request.name for request in self._failed if self.key(request) not in self.journal)
            self.report = replace(self.report, given_up=len(unanswered), unanswered=unanswered)
        if unanswered:
            logger.warning("LLM requests: %s", self.report)
        if self.report.stopped:
            logger.warning("LLM requests stopped early: %s", self.report.stopped)
        return self.report

    async def _in_flight(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the same work as many times at once as requests may be in flight."""
        workers = [asyncio.ensure_future(work()) for _ in range(self.in_flight)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, queue: Iterator[Request], bar: Any) -> None:
        for request in queue:
            if self.report.stopped:
                return
            key = self.key(request)
            if key not in self._requested:  # nodes with the same text share one request
                self._requested.add(key)
                refused = self.journal.unusable_answers(key) >= self.settings.attempts
                if key in self.journal:
                    self._count(from_journal=1)
                elif (error := await self._complete(request, key)) is not None:
                    self._failed.append(request)
                    self._check_hope(error, refused)
            bar.update()

    async def _work_again(self, failed: Iterator[Request]) -> None:
        """Send requests that failed once more, as the next run would: most of an API's failures are over by then."""
        for request in failed:
            if self.report.stopped:
                return
            await self._complete(request, self.key(request))

    async def _complete(self, request: Request, key: str) -> Exception | None:
        """Send a request until it has a usable answer or no attempts are left; returns why there is none."""
        most, unusable = self.settings.attempts, self.journal.unusable_answers(key)
        attempts = max(most - unusable, int(unusable < 2 * most))
        last: Exception = _UnusableAnswerError(f"{unusable} unusable answers in earlier runs")
        for attempt in range(attempts):
            if attempt > 0:
                wait = self.settings.backoff * 2.0 ** min(attempt - 1, 64)
                await asyncio.sleep(random.uniform(0, min(wait, self.settings.max_backoff)))
            if attempt == (attempts + 1) // 2:  # an LLM that fails at structured output may still write plain lines
                request = replace(request, output_cls=None)
            try:
                if self._limiter is not None:
                    await self._limiter.async_acquire()
                if self._limit_reached():  # after the wait, during which other requests were sent
                    return None
                await self._attempt(request, key)
                return None
            except LoraEmbedError:
                raise
            except Exception as error:
                last = error
        return last

    async def _attempt(self, request: Request, key: str) -> None:
        self._count(requests=1)
        call = asyncio.ensure_future(self._call(request))
        try:
            if self.synchronous:  # a thread cannot be stopped, and its late answer was paid for as well
                text, tokens = await asyncio.shield(call)
            else:
                text, tokens = await asyncio.wait_for(call, self.settings.timeout)
        except asyncio.CancelledError:
            if self.synchronous:
                with contextlib.suppress(Exception):
                    await self._record(request, key, *await call)
            raise
        except Exception:
            self._count(errors=1)
            raise
        answer, usable = await self._record(request, key, text, tokens)
        if not usable:
            self._count(unusable=1)
            raise _UnusableAnswerError(f"nothing usable in the answer {answer[:80]!r}")
        self._count(answered=1)

    async def _record(self, request: Request, key: str, text: Any, tokens: dict[str, int]) -> tuple[str, bool]:
        """Journal an answer; returns it and whether it is usable."""
        self._count(**tokens)
        answer = text if isinstance(text, str) else repr(text)
        try:
            usable = isinstance(text, str) and self.is_usable(text)
        except Exception:  # the answer was paid for and is kept, whatever it is that cannot be parsed
            usable = False
        self._answers |= usable
        record = {"key": key, "ok": usable, "answer": answer, **tokens}
        record |= {"text": request.text_hash, "llm": self.identity, "settings": request.settings}
        self._unwritten.append(record)
        await asyncio.shield(self._flush())
        return answer, usable

    async def _flush(self) -> None:
        """Write what is not yet on disk; answers that arrive during a write share the next one."""
        async with self._writing:
            if batch := self._unwritten[:]:
                await asyncio.to_thread(self.journal.append, batch)
                del self._unwritten[: len(batch)]

    async def _call(self, request: Request) -> tuple[Any, dict[str, int]]:
        """One call; returns (text, tokens). Prompts are built as the LLM's own `predict` builds them."""
        llm: Any = self._unlimited_llm
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

    def _limit_reached(self) -> bool:
        tokens = self.report.prompt_tokens + self.report.completion_tokens
        for name, limit, used in (
            ("max_requests", self.settings.max_requests, self.report.requests),
            ("max_tokens", self.settings.max_tokens, tokens),
        ):
            if limit is not None and used >= limit:
                self.report = replace(self.report, stopped=f"{name}={limit} is reached")
        return bool(self.report.stopped)

    def _check_hope(self, error: Exception, refused: bool) -> None:
        """Raise if the run is to end with a request without a usable answer.

        An LLM that refuses some nodes still works if it answered others, now or in earlier runs; `refused` says whether
        it refused this one in them.
        """
        logger.info("no usable answer to a request: %s", error)
        refusal = isinstance(error, _UnusableAnswerError) and (self.report.from_journal or refused)
        self._failures += 0 if refusal else 1
        hopeless = not self._answers and self._failures >= _MAX_FAILURES_WITHOUT_ANSWER
        if hopeless or self.settings.on_failure == "fail":
            hint = "Check its key, its address and its model name."
            if isinstance(error, _UnusableAnswerError):
                hint = "It answers, but not as the prompt asks: take a larger model, or another prompt."
            raise LLMError(
                f"no usable answer from {self.llm.class_name()} to {len(self._failed)} request(s), the last with "
                f"{type(error).__name__}: {error}",
                "answers to requests about nodes",
                f"{hint} Journalled answers are kept.",
            ) from error
