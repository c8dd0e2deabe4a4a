"""A part of a validation set that compares the steps of a training at less cost than all of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset

_NEARLY_ALL = 0.8  # share of the corpus from which on a subset saves too little
_RELEVANT = 0.7  # share of the passages at most
_LEAST_QUERIES = 100  # fewer, where there are more, are too few to compare steps


def selection_subset(
    dataset: EmbeddingQAFinetuneDataset, rankings: Mapping[str, Sequence[str]], passages: int, seed: int
) -> EmbeddingQAFinetuneDataset | None:
    """Queries with all their relevant passages, the hardest passages beside them, and random ones.

    A passage that no query is near changes no metric, whatever the step, so a small corpus can stand for a large one
    (as in NanoBEIR). Up to 70 % of the passages are relevant ones, of queries in random order; every query whose
    relevant passages are all among them takes part. Of those queries' rankings come the first passages that are not
    relevant, then the second ones, and so on; where the rankings hold too few, random ones make up the number. How well
    it agrees with the whole set is measured in benchmarks/README.md, "Checkpoint selection".

    Args:
        dataset: Validation data.
        rankings: For each query the ids of the base's best passages, best first.
        passages: Size of the subset's corpus.
        seed: Random seed.

    Returns:
        The subset, in the order of the dataset; None where it would hold nearly all passages, or too few queries.
    """
    if passages > _NEARLY_ALL * len(dataset.corpus):
        return None
    shuffled = random.Random(seed)
    order = shuffled.sample(list(dataset.queries), len(dataset.queries))
    chosen: dict[str, None] = {}  # a set that keeps its order
    for query in order:
        missing = dict.fromkeys(i for i in dataset.relevant_docs[query] if i not in chosen)
        if len(chosen) + len(missing) <= _RELEVANT * passages:
            chosen |= missing
    queries = [query for query in dataset.queries if chosen.keys() >= set(dataset.relevant_docs[query])]
    if len(queries) < min(_LEAST_QUERIES, len(dataset.queries)):
        return None
    longest = max(len(rankings[query]) for query in queries)
    hard = (rankings[query][rank] for rank in range(longest) for query in queries if rank < len(rankings[query]))
    _fill(chosen, hard, passages)
    _fill(chosen, shuffled.sample(list(dataset.corpus), len(dataset.corpus)), passages)
    return dataset.subset(queries, chosen)


def _fill(chosen: dict[str, None], more: Iterable[str], size: int) -> None:
    """Add ids until there are so many."""
    for passage_id in more:
        if len(chosen) >= size:
            return
        chosen[passage_id] = None
