"""Fake LLMs: with latency, with failures, and with the odd answers of providers."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from typing import Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.schema import TextNode

from llama_index_lora_embed.config import LLMSettings
from llama_index_lora_embed.core.files import read_json_lines
from llama_index_lora_embed.data import LLMQueryGenerator


def calm_answer(prompt: str) -> str:
    """Two queries that depend on the prompt alone, or the grade 2 where one is asked for."""
    if "Reply with the grade alone" in prompt:
        return "2"
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"question: what is thing {mark} about?\nkeywords: thing {mark} size"


class FakeLLM(CustomLLM):
    """Answers after `latency` seconds with the items of `answers` in turn, or with `calm_answer`."""

    latency: float = 0.0
    answers: list[Any] = Field(default_factory=list)
    calls: int = 0
    at_once: int = 0
    most_at_once: int = 0
    prompts: list[str] = Field(default_factory=list)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="fake", context_window=4096)

    def answer(self, prompt: str) -> Any:
        self.prompts.append(prompt)
        answer = self.answers[self.calls % len(self.answers)] if self.answers else calm_answer(prompt)
        self.calls += 1
        return answer

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.latency)
        self.at_once -= 1
        answer = self.answer(prompt)
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, str):
            return answer
        return CompletionResponse(text=answer, additional_kwargs={"prompt_tokens": 100, "completion_tokens": 7})

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError


class ChaosLLM(FakeLLM):
    """Three calls in ten fail, hang, or answer with nothing, a refusal or noise. Good answers are logged first."""

    log: str = ""

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        await asyncio.sleep(random.random() * self.latency)
        if random.random() < 0.3:
            kind = random.randrange(6)
            if kind == 0:
                raise ConnectionError("reset by peer")
            if kind == 1:
                await asyncio.sleep(3600)
            bad = ["", "I'm sorry, but I can't help with that.", "@@## %% <<>> 12 34", ValueError("an object")][
                kind - 2
            ]
            return CompletionResponse(text=bad) if isinstance(bad, str) else bad
        with open(self.log, "a") as file:
            file.write(hashlib.sha256(prompt.encode()).hexdigest() + "\n")
            file.flush()
            os.fsync(file.fileno())
        return CompletionResponse(text=calm_answer(prompt))


FAST = LLMSettings(backoff=0.001, max_backoff=0.01, timeout=5, show_progress=False)


def journalled(path):
    """The records of a journal, of which the first line is the header."""
    return read_json_lines(path)[1:]


def some_nodes(count=12, start=0):
    return [
        TextNode(text=f"Chapter {i} of the handbook says how the machine number {i} is cleaned.", id_=f"n{i}")
        for i in range(start, start + count)
    ]


def generator(llm, journal, **kwargs):
    return LLMQueryGenerator(llm=llm, journal=journal, **{"settings": FAST, **kwargs})


class Blocking(CustomLLM):
    """An LLM without asynchronous methods of its own."""

    @property
    def metadata(self):
        return LLMMetadata(model_name="blocking")

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **kwargs):
        time.sleep(0.3)
        return CompletionResponse(text=calm_answer(prompt))

    def stream_complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError


class Structured(FakeLLM):
    """An LLM with function calling: answers with the requested pydantic class, or fails."""

    broken: bool = False

    @property
    def metadata(self):
        return super().metadata.model_copy(update={"is_function_calling_model": True})

    async def astructured_predict(self, output_cls, prompt, llm_kwargs=None, **prompt_args):
        self.calls += 1
        if self.broken:
            raise ValueError("no tool call")
        return output_cls(queries=[{"style": "keywords", "query": "machine cleaning"}])
