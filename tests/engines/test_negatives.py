"""What queries are compared with, chosen by linear maps of vectors that are known."""

from __future__ import annotations

import torch
from torch import nn

from llama_index_lora_embed.engines.negatives import column_scores, negatives_by_linear_map
from llama_index_lora_embed.training.embedding_adapter import FrozenVectors
from llama_index_lora_embed.training.objectives.corpus_targets import CorpusTargets

D = 16


def targets(queries: int, columns: int) -> CorpusTargets:
    """Query n asks for column n."""
    none: list[list[int]] = [[] for _ in range(queries)]
    return CorpusTargets(
        [f"q{n}" for n in range(queries)],
        [(f"p{n}", f"passage {n}") for n in range(columns)],
        [[n] for n in range(queries)],
        [[1.0] for _ in range(queries)],
        none,
        none,
    )


def test_a_query_s_score_is_its_ndcg_among_the_columns_but_its_false_negatives() -> None:
    known = targets(3, 3)
    known.ignored[2] = [0]  # it is nearest to query 2, which is no mistake
    score = column_scores(FrozenVectors(torch.eye(3), torch.eye(3), known))
    mapped = torch.tensor([[1.0, 0, 0], [1, 0.5, 0], [1, 0, 0.5]])
    first, second, third = score(mapped, range(3))
    assert (first, third) == (1.0, 1.0)
    assert round(second, 4) == 0.6309, "1 / log2(3) at the second place"


def test_passages_that_nobody_asks_for_are_negatives_where_that_helps_queries_that_are_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    passages = nn.functional.normalize(torch.randn(360, 16, generator=generator), dim=1)
    # what nobody asks for lies where all queries are drawn to
    drawn = torch.ones(16) / 4
    passages[120:] = nn.functional.normalize(drawn + 0.3 * passages[120:], dim=1)
    assert negatives_by_linear_map(passages[:120] + drawn, passages, targets(120, 360), seed=0) == "corpus"


def test_passages_that_nobody_asks_for_are_left_out_where_they_are_like_those_that_will_be() -> None:
    generator = torch.Generator().manual_seed(0)
    passages = nn.functional.normalize(torch.randn(130, 32, generator=generator), dim=1)
    noisy = passages[:120] + 0.44 * torch.randn(120, 32, generator=generator)
    assert negatives_by_linear_map(noisy, passages, targets(120, 130), seed=0) == "answered"
