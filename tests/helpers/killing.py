"""Models that kill their own process: each of `times` once, however often the process is started again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field

from llama_index_lora_embed.embedding import LoraEmbedding
from tests.helpers.llms import FakeLLM


def die_once(folder: str, mark: str) -> None:
    """Kill this process, unless one was killed at this mark before."""
    try:
        (Path(folder) / mark).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class KillingEmbedding(LoraEmbedding):
    """A LoraEmbedding that kills its process at texts that contain a mark."""

    marks: list[str] = Field(default_factory=list)
    folder: str = ""

    def get_text_embedding_batch(self, texts, show_progress=False, **kwargs):
        for mark in self.marks:
            if any(mark in text.split() for text in texts):
                die_once(self.folder, mark)
        return super().get_text_embedding_batch(texts, show_progress, **kwargs)


class KillingLLM(FakeLLM):
    """An LLM that writes each answer that it gives into a ledger, and kills its process at prompts with a mark."""

    marks: list[str] = Field(default_factory=list, exclude=True)
    folder: str = Field(default="", exclude=True)

    async def acomplete(self, prompt, formatted=False, **kwargs):
        for mark in self.marks:
            if f"{mark} " in prompt:
                die_once(self.folder, mark)
        answer = await super().acomplete(prompt, formatted, **kwargs)
        with open(Path(self.folder) / "ledger", "a") as file:
            file.write(prompt.replace("\n", " ") + "\n")
        return answer


class FailingEmbedding(BaseEmbedding):
    """Vectors of a text's length; fails for texts with "bad", and gives one that is not finite for "infinite"."""

    def _get_text_embedding(self, text):
        if "bad" in text:
            raise ValueError("a bad text")
        return [float("inf") if "infinite" in text else float(len(text)), 1.0]

    def _get_query_embedding(self, query):
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)
