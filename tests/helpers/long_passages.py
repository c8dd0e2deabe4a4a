"""Passages that are longer than the tiny model's own length."""

from __future__ import annotations

import random
from typing import Literal

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from tests.conftest import WORDS


def long_passages(
    answer: Literal["first", "last"], passages: int = 24, seed: int = 0, words: int = 50
) -> EmbeddingQAFinetuneDataset:
    """Passages of some 50 words, of which their two queries are about the first ten or the last ten.

    The others come from the same twenty words in all passages.
    """
    rng = random.Random(seed)
    corpus, queries, relevant = {}, {}, {}
    for number in range(passages):
        about, rest = rng.sample(WORDS[20:], 10), rng.choices(WORDS[:20], k=words - 10)
        corpus[f"p{seed}-{number}"] = " ".join(about + rest if answer == "first" else rest + about)
        for question in range(2):
            query_id = f"q{seed}-{number}-{question}"
            queries[query_id] = " ".join(rng.sample(about, 3)) + " ?"
            relevant[query_id] = [f"p{seed}-{number}"]
    return EmbeddingQAFinetuneDataset(
        queries=queries, corpus=corpus, relevant_docs=relevant, query_origins=dict.fromkeys(queries, "human")
    )
