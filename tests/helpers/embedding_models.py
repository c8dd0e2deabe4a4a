"""A deterministic embedding model as behind an API: each text costs, and the nth can fail."""

import asyncio
import zlib
from pathlib import Path

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

DIMENSIONS = 24


def turned(dimensions=DIMENSIONS):
    """A fixed rotation, which a linear adapter can learn."""
    return np.linalg.qr(np.random.default_rng(1).normal(size=(dimensions, dimensions)))[0]


class PaidEmbedding(BaseEmbedding):
    """Sums of a random vector for each word; those of queries are turned, so that there is something to learn.

    Attributes:
        model_name: Decides nothing but the identity.
        ledger: File to which each text that is paid for is appended; "" for none.
        fails_at: Number of the text at which it raises; 0 for never.
        length: Factor of the passages' vectors, whose nth differs by n / 10 where it is not 1.
        turn: How far the vectors of queries are turned.
    """

    model_name: str = "paid"
    embed_batch_size: int = 4
    dimensions: int = DIMENSIONS
    ledger: str = Field(default="", exclude=True)
    fails_at: int = Field(default=0, exclude=True)
    length: float = 1.0
    turn: float = 1.0
    _paid: list = PrivateAttr(default_factory=list)

    @property
    def paid(self):
        """The texts that were paid for."""
        return self._paid

    def _vector(self, text, query):
        self._paid.append(text)
        if self.ledger:
            with open(self.ledger, "a") as file:
                file.write(f"{'query' if query else 'passage'}: {text}\n")
        if self.fails_at and len(self._paid) == self.fails_at:
            raise ConnectionError(f"text {self.fails_at} was refused")
        rows = [np.random.default_rng(zlib.crc32(word.encode())).normal(size=self.dimensions) for word in text.split()]
        vector = np.sum(rows, axis=0)
        vector /= np.linalg.norm(vector)
        if query:
            vector = (1 - self.turn) * vector + self.turn * (turned(self.dimensions) @ vector)
        elif self.length != 1:
            vector *= self.length + len(text) % 7 / 10
        return vector.tolist()

    def _get_query_embedding(self, query):
        return self._vector(query, True)

    async def _aget_query_embedding(self, query):
        await asyncio.sleep(0.001)
        return self._vector(query, True)

    def _get_text_embedding(self, text):
        return self._vector(text, False)

    def _get_text_embeddings(self, texts):
        return [self._vector(text, False) for text in texts]

    async def _aget_text_embeddings(self, texts):
        await asyncio.sleep(0.001)
        return self._get_text_embeddings(texts)


def paid_twice(ledger):
    """The texts in a ledger that were paid for more than once."""
    lines = Path(ledger).read_text().splitlines()
    return sorted({line for line in lines if lines.count(line) > 1})
