"""Loss of "in_batch" and "soft_labels": a softmax over the batch's passages without the false negatives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.efficiency.frozen_layers import HiddenStateCache
from llama_index_lora_embed.training.efficiency.gradcache import (
    KeptActivations,
    cached_loss,
    embed,
    embed_all,
    unwrapped,
)
from llama_index_lora_embed.training.objectives.collator import IGNORED, NEGATIVE

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class MaskedInfoNCELoss(nn.Module):
    """InfoNCE with in-batch negatives, where false negatives are masked.

    For a query q, the relevance r_p of its passages P in the batch (one passage, unless labels are soft) and the set N
    of its negatives there,

        loss(q) = −max_P r · Σ_{p ∈ P} (r_p / Σ_P r) · log( exp(cos(q, p)/τ) / Σ_{p' ∈ P ∪ N} exp(cos(q, p')/τ) ),

    averaged over the queries. With one passage this is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation
    4), weighted by the passage's relevance; sentence-transformers' MultipleNegativesRankingLoss is the same without
    mask and weights and with one query per passage. With several passages it is the cross-entropy against a
    distribution in proportion to relevance (Bruch et al. 2019, "An Analysis of the Softmax Cross Entropy Loss for
    Learning-to-Rank with Binary Relevance"); a query has the weight of its most relevant passage, however many of its
    passages the batch holds.

    A query with one passage whose negatives are all masked has loss 0 and no gradient; it counts in the average.

    With several processes (`torch.distributed`), each process encodes its share, gathers the embeddings of all, and
    computes the loss of the whole batch. The gradient reaches its own embeddings only and is multiplied by the number
    of processes, because `DistributedDataParallel` divides the sum of the gradients by it: the optimizer sees the
    gradient that one process would have with the whole batch.

    Args:
        temperature: τ, above 0.
        cached: Encode one chunk at a time, twice (`gradcache.cached_loss`).
        guide_margin: Mask negatives whose cosine similarity to the query, under the untuned base, is above that of the
            query's passage (the lowest, if there are several) minus this margin; hard negatives of the dataset are
            not masked. None uses no guide. (GISTEmbed; Solatorio 2024, arXiv 2402.16829, here with the model's own
            base as the guide.)
        dims: Add the loss of the first d dimensions, for each d of these (Kusupati et al. 2022, arXiv 2205.13147,
            equation 1; every summand has weight 1, as in the paper and in sentence-transformers' MatryoshkaLoss).

    Attributes:
        hidden_state_cache: Computes the frozen layers once per text; None computes them in every step.
        kept: Which chunks are not encoded twice, where `cached`; None for the largest.
        alone: Whether this process's embeddings stand in for those of the others: a trial step takes as much memory as
            a real one, and must not wait for a process that has run out of it.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float,
        *,
        cached: bool = False,
        guide_margin: float | None = None,
        dims: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.temperature = temperature
        self.cached = cached
        self.guide_margin = guide_margin
        self.dims = tuple(dims)
        self.hidden_state_cache: HiddenStateCache | None = None
        self.kept: KeptActivations | None = None
        self.alone = False

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """Compute the loss, a scalar that is the same in all processes.

        Args:
            features: Token tensors, chunks of queries first, then chunks of passages; each of several processes has
                its share (see `GroupCollator`).
            labels: float [queries, passages] of all processes: the relevance (above 0, at most 1) of the query's
                passages; otherwise NEGATIVE, IGNORED or CURATED.
        """
        chunks = list(features)
        if self.guide_margin is not None:
            labels = self._mask_by_guide(chunks, labels, self.guide_margin)

        def loss_of(embeddings: Tensor) -> Tensor:
            return self._loss_of(*self._gather(embeddings, labels), labels)

        if self.cached:
            return cached_loss(self.model, chunks, loss_of, self.hidden_state_cache, self.kept)
        return loss_of(embed_all(self.model, chunks, self.hidden_state_cache))

    def _loss_of(self, queries: Tensor, passages: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings [queries, dimension] and [passages, dimension], summed over `dims`."""
        width = queries.shape[1]
        losses = []
        # in float32, because a bfloat16 product would round the scores to two digits
        with torch.autocast(queries.device.type, enabled=False):
            for size in sorted({width, *(d for d in self.dims if d < width)}):
                similarities = _unit(queries[:, :size]) @ _unit(passages[:, :size]).T
                losses.append(self._of_similarities(similarities, labels))
        return torch.stack(losses).sum()

    def _of_similarities(self, similarities: Tensor, labels: Tensor) -> Tensor:
        """The loss of cosine similarities [queries, passages]."""
        ignored = labels == IGNORED
        relevance = labels.clamp(min=0)
        weight, target = relevance.amax(dim=1), relevance / relevance.sum(dim=1, keepdim=True)
        scores = similarities / self.temperature
        log_probabilities = scores.masked_fill(ignored, float("-inf")).log_softmax(dim=1)
        # a masked passage has target 0, but 0 · −∞ is not 0
        return (weight * -(target * log_probabilities.masked_fill(ignored, 0.0)).sum(dim=1)).mean()

    def _gather(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of all processes' queries and passages, from its own queries and then passages."""
        queries, passages = labels.shape[-2:]
        if distributed.world_size() == 1:
            return embeddings[:queries], embeddings[queries:]
        own = len(range(distributed.rank(), queries, distributed.world_size()))
        return _gather(embeddings[:own], queries, self.alone), _gather(embeddings[own:], passages, self.alone)

    def _mask_by_guide(self, chunks: Sequence[dict[str, Any]], labels: Tensor, margin: float) -> Tensor:
        """The labels, with negatives ignored that the base finds closer to the query than its passage."""
        with torch.no_grad(), adapter_disabled(unwrapped(self.model)) as base:
            embeddings = torch.cat([embed(base, chunk, self.hidden_state_cache) for chunk in chunks])
            queries, passages = self._gather(embeddings, labels)
        with torch.autocast(labels.device.type, enabled=False):
            similarities = _unit(queries) @ _unit(passages).T
        lowest = similarities.masked_fill(labels <= 0, float("inf")).amin(dim=1, keepdim=True)
        return labels.masked_fill((labels == NEGATIVE) & (similarities > lowest - margin), IGNORED)


def _gather(own: Tensor, total: int, alone: bool) -> Tensor:
    """Embeddings of all processes in the order of the labels: of `total`, process r of w has those at r, r + w, ...

    Only this process's own have a gradient, multiplied by w.
    """
    rank, world = distributed.rank(), distributed.world_size()
    missing = -(-total // world) - len(own)  # shares differ by at most one, but all must send the same shape
    sent = nn.functional.pad(own.detach(), (0, 0, 0, missing)).contiguous()
    parts = [sent.clone() for _ in range(world)]
    if not alone:
        dist.all_gather(parts, sent)
    if own.requires_grad:
        scaled = own + (world - 1) * (own - own.detach())  # the value of `own`, and w times its gradient
        parts[rank] = nn.functional.pad(scaled, (0, 0, 0, missing))
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model has neither adapter nor dropout; afterwards gradients and training modes are as before.

    peft switches gradients off together with the adapters, and later on again for all of them; transformers'
    `enable_adapters` leaves out `modules_to_save`.
    """
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [module for module in model.modules() if module.training]
    for layer in layers:
        layer.enable_adapters(False)
    model.eval()
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
        for module in training:
            module.training = True


def _unit(embeddings: Tensor) -> Tensor:
    return nn.functional.normalize(embeddings, dim=-1)
