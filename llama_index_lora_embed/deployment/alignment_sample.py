"""The passages that a bridge is learnt from and judged on, and the queries that judge it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from llama_index.core.schema import BaseNode, TextNode

from llama_index_lora_embed.core.arrays import unit_norm
from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.data.build import default_query_generators
from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.data.questions.base import FirstOf
from llama_index_lora_embed.data.stored_vectors import FloatArray, StoredVectors
from llama_index_lora_embed.evaluation.verdict import evidence_of

FEWEST = 40
"""Passages; five eighths of them are learnt from."""

_JUDGE, _CHOOSE = 4, 8  # one passage in so many


@dataclass(frozen=True, eq=False)
class AlignmentSample:
    """Passages of an index in three parts, and queries about the first of them.

    Attributes:
        texts: As indexing embeds them.
        old: Their stored vectors, scaled to length 1, [passages, dimensions].
        judge: Rows that recall is measured on.
        choose: Rows that the kind of the map is chosen on.
        learn: Rows that the map is learnt from.
        queries: Texts of the queries.
        relevant: For each of them the rows of its relevant passages, all in `judge`.
        basis: What the queries are, in words.
    """

    texts: list[str]
    old: FloatArray
    judge: range
    choose: range
    learn: range
    queries: list[str]
    relevant: list[set[int]]
    basis: str


def draw_sample(
    pool: StoredVectors, dataset: EmbeddingQAFinetuneDataset | None, size: int, seed: int
) -> AlignmentSample:
    """Draw a sample of passages; a quarter is judged on, an eighth chosen on, and the rest learnt from.

    Args:
        pool: Passages with texts.
        dataset: Queries about some of them: as many are taken as have their relevant passages in a quarter of the
            sample. None makes queries from the passages: titles, first sentences and definitions, and where there are
            none of these, takes the passages themselves.
        size: Number of passages at most.
        seed: Random seed.
    """
    size, rng = min(size, len(pool)), random.Random(seed)
    asked = [] if dataset is None else _fitting(dataset, size // _JUDGE, rng)
    judged = list(dict.fromkeys(i for _, ids in asked for i in ids)) or rng.sample(pool.ids, size // _JUDGE)
    others = list(set(pool.ids).difference(judged))
    rest = rng.sample(sorted(others), min(size - len(judged), len(others)))
    rows = {node_id: row for row, node_id in enumerate(pool.ids)}
    order = [rows[i] for i in [*judged, *rest]]
    chosen_on = len(judged) + size // _CHOOSE
    place = {pool.ids[row]: at for at, row in enumerate(order)}
    if dataset is not None:
        queries = [text for text, _ in asked]
        relevant = [{place[i] for i in ids} for _, ids in asked]
        basis = " and ".join(sorted({evidence_of(origin).value for origin in dataset.origins()}))
    else:
        queries, relevant, basis = _made([pool.nodes[row] for row in order[: len(judged)]], seed)
    return AlignmentSample(
        texts=[pool.texts[row] for row in order],
        old=unit_norm(pool.vectors[order]),
        judge=range(len(judged)),
        choose=range(len(judged), chosen_on),
        learn=range(chosen_on, len(order)),
        queries=queries,
        relevant=relevant,
        basis=basis,
    )


def _fitting(dataset: EmbeddingQAFinetuneDataset, most: int, rng: random.Random) -> list[tuple[str, list[str]]]:
    """Queries with the ids of their relevant passages, of which there are at most so many, or those of one query."""
    query_ids, found, passages = list(dataset.queries), [], set[str]()
    rng.shuffle(query_ids)
    for query_id in query_ids:
        relevant = dataset.relevant_docs[query_id]
        if not passages or len(passages.union(relevant)) <= most:
            passages.update(relevant)
            found.append((dataset.queries[query_id], relevant))
    return found


def _made(nodes: list[BaseNode], seed: int) -> tuple[list[str], list[set[int]], str]:
    """Queries made from nodes, the rows of the nodes, and what the queries are."""
    rows = {node.node_id: row for row, node in enumerate(nodes)}
    made = list(FirstOf(*default_query_generators()).generate(nodes, seed=seed))
    if not made:
        texts = StoredVectors(nodes, np.ones((len(nodes), 1), np.float32)).texts
        return texts, [{row} for row in range(len(nodes))], "held-out passages in the place of queries"
    kind = "titles and sentences of held-out passages in the place of queries"
    return [query.text for query in made], [{rows[query.node_id]} for query in made], kind


def passages_with_text(
    stored: StoredVectors, dataset: EmbeddingQAFinetuneDataset | None, learnt: StoredVectors | None
) -> StoredVectors:
    """The passages that a sample can be drawn from.

    Args:
        stored: The index.
        dataset: Over its passages, with texts that the store may lack.
        learnt: Passages to learn from in the place of the index's, of which only those of the dataset are then kept.

    Raises:
        DatasetError: There are too few.
    """
    known = {} if dataset is None else dataset.corpus
    needed = set[str]() if dataset is None else dataset.answer_ids()
    nodes, rows = [], []
    for row, (node, has_text, text) in enumerate(zip(stored.nodes, stored.has_text, stored.texts, strict=True)):
        own = known.get(node.node_id, text)
        if (has_text or own != text) and (learnt is None or node.node_id in needed):
            nodes.append(node if has_text else TextNode(id_=node.node_id, text=own))
            rows.append(row)
    vectors = stored.vectors[rows]
    if learnt is not None:
        nodes, vectors = [*nodes, *learnt.nodes], np.concatenate([vectors, learnt.vectors])
    if len(nodes) < FEWEST:
        raise DatasetError(
            f"{len(nodes)} passages with text to learn a map from",
            f"at least {FEWEST}; some thousand are better",
            "Pass an index or a StorageContext with its docstore, or texts= and old_model=; or re-embed so few.",
        )
    return StoredVectors(nodes, vectors)
