"""LangChain's embeddings on an adapter directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_index_lora_embed import LoraEmbedding
from tests.conftest import make_dataset

langchain_huggingface = pytest.importorskip("langchain_huggingface")
pytestmark = pytest.mark.extended


def test_langchain_embeds_as_this_package_does_and_finds_the_same_passages(adapter: Path) -> None:
    from langchain_core.vectorstores import InMemoryVectorStore

    theirs = langchain_huggingface.HuggingFaceEmbeddings(model_name=str(adapter), model_kwargs={"device": "cpu"})
    ours, data = LoraEmbedding(adapter), make_dataset()
    texts, queries = list(data.corpus.values()), list(data.queries.values())
    np.testing.assert_allclose(theirs.embed_documents(texts), ours.get_text_embedding_batch(texts), atol=1e-5)
    np.testing.assert_allclose(theirs.embed_query(queries[0]), ours.get_query_embedding(queries[0]), atol=1e-5)
    store = InMemoryVectorStore(theirs)
    store.add_texts(texts)
    vectors = np.array(ours.get_text_embedding_batch(texts))
    for query in queries[:8]:
        best = texts[int(np.argmax(vectors @ np.array(ours.get_query_embedding(query))))]
        assert store.similarity_search(query, k=1)[0].page_content == best
