"""Which passages queries are compared with where passages keep their vectors: what does better on folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llama_index_lora_embed.config import EmbeddingAdapterSettings
from llama_index_lora_embed.evaluation.metrics import DEPTH, compute_metrics
from llama_index_lora_embed.evaluation.search import nearest
from llama_index_lora_embed.models.embedding_adapter import LinearLayer
from llama_index_lora_embed.training.embedding_adapter import FrozenVectors, choose_negatives
from llama_index_lora_embed.training.objectives.corpus_targets import CorpusTargets


def negatives_by_linear_map(queries: Tensor, passages: Tensor, targets: CorpusTargets, seed: int) -> str:
    """Choose "corpus" or "answered" by linear maps of the queries that an encoder will be trained on.

    Training the encoder itself on folds would take several times as long as the run. On folds of tenk_train and
    medquad_train a map and a LoRA did better with the same (benchmarks/README.md, "Queries alone").

    Args:
        queries: Vectors of the training queries, in the order of the targets; any norm.
        passages: Vectors of all columns, of length 1.
        targets: Which columns are relevant to which query.
        seed: Of the folds and of the order of the queries.
    """
    settings = EmbeddingAdapterSettings(seed=seed)
    data = FrozenVectors(nn.functional.normalize(queries.float(), dim=-1), passages, targets)
    dimensions = queries.shape[1]
    adapter = LinearLayer(dimensions, dimensions).to(passages.device)

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)

    return choose_negatives(adapter, data, settings, optimizer, column_scores(data))[0]


def column_scores(data: FrozenVectors) -> Callable[[Tensor, Sequence[int]], list[float]]:
    """nDCG@10 of training queries, searched among all columns but their false negatives."""
    targets, passages = data.targets, data.passages.cpu().numpy()

    def score(mapped: Tensor, rows: Sequence[int]) -> list[float]:
        vectors = nn.functional.normalize(mapped.float(), dim=-1).cpu().numpy()
        found, _ = nearest(vectors, passages, DEPTH)
        ranked, grades = {}, {}
        for row, columns in zip(rows, found.tolist(), strict=True):
            hidden = set(targets.ignored[row])
            ranked[str(row)] = [str(column) for column in columns if column not in hidden]
            graded = zip(targets.relevant[row], targets.relevance[row], strict=True)
            grades[str(row)] = {str(column): grade for column, grade in graded}
        return [values["ndcg@10"] for values in compute_metrics(ranked, grades).values()]

    return score
