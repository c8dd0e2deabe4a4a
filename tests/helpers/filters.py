"""Datasets for the filters, their result, and an embedding model that knows words alone."""

import hashlib

from llama_index.core.base.embeddings.base import BaseEmbedding

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.filters.rules import filter_queries
from tests.helpers.passages import PASSWORD, SHIPPING, WARRANTY

CORPUS = {"shipping": SHIPPING, "warranty": WARRANTY, "password": PASSWORD}


class HashedWords(BaseEmbedding):
    """A bag of hashed words."""

    def _vector(self, text):
        vector = [0.0] * 256
        for word in text.lower().replace("?", " ").replace(".", " ").replace(",", " ").split():
            vector[int(hashlib.md5(word.encode()).hexdigest(), 16) % 256] += 1.0
        return vector

    def _get_text_embedding(self, text):
        return self._vector(text)

    def _get_query_embedding(self, query):
        return self._vector(query)

    async def _aget_query_embedding(self, query):
        return self._vector(query)


def make(queries, corpus=CORPUS, origins="llm", **fields):
    """A dataset from (query, passage id) or (query, passage id, origin)."""
    rows = [row if len(row) == 3 else (*row, origins) for row in queries]
    return EmbeddingQAFinetuneDataset(
        queries={f"q{i}": row[0] for i, row in enumerate(rows)},
        corpus=corpus,
        relevant_docs={f"q{i}": [row[1]] for i, row in enumerate(rows)},
        query_origins={f"q{i}": row[2] for i, row in enumerate(rows)},
        **fields,
    )


def run(dataset, settings=None, **arguments):
    """Ids kept and reasons, after what is true of every run was checked."""
    before = dataset.model_copy(deep=True)
    result, report = filter_queries(dataset, settings, **arguments)
    assert dataset == before, "the input is not changed"
    assert list(result.corpus.items()) == list(dataset.corpus.items())
    assert list(result.queries) == [i for i in dataset.queries if i in result.queries], "order is kept"
    assert report.given == len(dataset.queries)
    assert report.kept == len(result.queries)
    assert report.given == report.kept + sum(report.dropped.values())
    assert filter_queries(dataset, settings, **arguments)[1] == report, "deterministic"
    return list(result.queries), report
