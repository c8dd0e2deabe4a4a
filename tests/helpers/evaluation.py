"""Evaluations of a chosen quality, and an embedding model without weights."""

import asyncio

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from llama_index_lora_embed import LabelledPairs
from llama_index_lora_embed.evaluation import RetrievalEvaluation
from llama_index_lora_embed.evaluation.pairs import evaluate_pair_encoders
from llama_index_lora_embed.evaluation.retrieval import evaluate_encoders


class WordCountEmbedding(BaseEmbedding):
    """Counts of hashed words, served like those of an API: with a delay, in batches; requests are counted."""

    dimensions: int = 24
    api_key: str = "secret"
    _calls: list = PrivateAttr(default_factory=list)
    _running: list = PrivateAttr(default_factory=lambda: [0, 0])

    def vector(self, text):
        vector = [0.0] * self.dimensions
        for word in text.split():
            vector[sum(word.encode()) % self.dimensions] += 1.0
        return vector

    def _get_query_embedding(self, query):
        self._calls.append(("query", 1))
        return self.vector(query)

    def _get_text_embedding(self, text):
        return self.vector(text)

    def _get_text_embeddings(self, texts):
        self._calls.append(("texts", len(texts)))
        return [self.vector(text) for text in texts]

    async def _under_way(self, value):
        self._running[0] += 1
        self._running[1] = max(self._running)
        await asyncio.sleep(0.002)
        self._running[0] -= 1
        return value

    async def _aget_query_embedding(self, query):
        return await self._under_way(self._get_query_embedding(query))

    async def _aget_text_embeddings(self, texts):
        return await self._under_way(self._get_text_embeddings(texts))


def noisy_evaluation(noise, dataset, seed=0):
    """An evaluation by query vectors that are those of the relevant passages plus noise."""
    rng, own = np.random.default_rng(seed), np.random.default_rng([seed, int(100 * noise)])
    vectors = {text: rng.normal(size=16) for text in dataset.corpus.values()}
    for query_id, text in dataset.queries.items():
        vectors[text] = vectors[dataset.corpus[dataset.relevant_docs[query_id][0]]] + noise * own.normal(size=16)

    def encode(texts):
        return np.stack([vectors[text] for text in texts])

    return evaluate_encoders(encode, encode, dataset)


def evaluation_with(scores, origins=None):
    """An evaluation with a given nDCG@10 of each query; the queries have the origins in order."""
    per_query = {f"q{i}": {"ndcg@10": float(score)} for i, score in enumerate(scores)}
    origins = origins or {"human": len(scores)}
    kinds = [origin for origin, count in origins.items() for _ in range(count)]
    return RetrievalEvaluation(
        {"ndcg@10": float(np.mean(scores))},
        per_query,
        {},
        origins,
        passages=10,
        query_origins=dict(zip(per_query, kinds, strict=True)),
    )


def pair_evaluation(similarities, labels):
    """An evaluation with given similarities, by vectors in the plane."""
    count = len(labels)
    pairs = LabelledPairs([f"a{i}" for i in range(count)], [f"b{i}" for i in range(count)], labels, symmetric=False)
    first = np.tile([1.0, 0.0], (count, 1))
    second = np.stack([similarities, np.sqrt(1 - np.square(similarities))], axis=1)
    return evaluate_pair_encoders(lambda texts: first, lambda texts: second, pairs)


def labels_and_similarities(count=400, graded=False, signal=0.1, seed=0):
    """Random labels, and similarities that are correlated with them."""
    rng = np.random.default_rng(seed)
    labels = rng.random(count) if graded else (rng.random(count) < 0.4).astype(float)
    return labels, np.clip(0.3 + signal * labels + rng.normal(0, 0.1, count), -1, 1)
