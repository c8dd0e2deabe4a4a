"""Headings as validation queries: of all synthetic queries, they say most about human-written ones."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence

from llama_index.core.schema import BaseNode, TextNode

from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.origins import NOT_SYNTHETIC, PARTS_OF_PASSAGES, TITLE
from llama_index_lora_embed.data.questions.heuristic import TitleQueryGenerator
from llama_index_lora_embed.data.text import normalise

MIN_HEADINGS = 30
"""Headings below which synthetic queries allow no verdict. Of 29 models that lost more than 0.02 nDCG@10 on
human-written queries, 16 lost on at least 30 headings, and none of 249 that gained did (benchmarks/README.md)."""

_MOST = 300  # as many as the trials had on each side


def validate_on_headings(
    val: EmbeddingQAFinetuneDataset,
    trained_on: Collection[str],
    nodes: Sequence[BaseNode] | None = None,
    *,
    seed: int = 0,
) -> EmbeddingQAFinetuneDataset:
    """Synthetic validation queries as headings, if the passages have at least `MIN_HEADINGS` of them.

    Where headings were not trained on, those of all passages of the validation corpus are added, at most 300: they
    show whether a gain transfers to queries that somebody else wrote. Queries that are parts of passages, which nearly
    every training improves, are left out. A heading that several nodes share is not used: each would be wrong for the
    others. With queries that people wrote or typed, or whose origin is not known, nothing is changed.

    Args:
        val: Held-out queries.
        trained_on: Origins of the training queries.
        nodes: The nodes of the corpus, whose metadata may hold titles; None takes the passages' texts.
        seed: Random seed of the sample.
    """
    if not val.origins().keys().isdisjoint(NOT_SYNTHETIC):
        return val
    if TITLE not in trained_on:
        if nodes is None:
            nodes = [TextNode(id_=i, text=text) for i, text in val.corpus.items()]
        made = list(TitleQueryGenerator().generate([node for node in nodes if node.node_id in val.corpus]))
        uses = Counter(normalise(query.text) for query in made)
        found = [query for query in made if uses[normalise(query.text)] == 1]
        if len(found) < MIN_HEADINGS:
            return val
        sample = random.Random(seed).sample(found, min(_MOST, len(found)))
        headings = {f"heading:{query.node_id}": query for query in sample}
        val = val.model_copy(
            update={
                "queries": {**val.queries, **{i: query.text for i, query in headings.items()}},
                "relevant_docs": {**val.relevant_docs, **{i: [query.node_id] for i, query in headings.items()}},
                "query_origins": {**(val.query_origins or {}), **dict.fromkeys(headings, TITLE)},
            }
        )
    if val.origins().get(TITLE, 0) < MIN_HEADINGS:
        return val
    return val.subset((i for i in val.queries if val.origin_of(i) not in PARTS_OF_PASSAGES), val.corpus)
