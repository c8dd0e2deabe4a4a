"""The loss of "in_batch" and "soft_labels": a softmax over the passages of the batch that are no false negatives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.training.efficiency.frozen_layers import HiddenStateCache
from llama_index_lora_embed.training.efficiency.gradcache import cached_loss, embed, embed_all, unwrapped
from llama_index_lora_embed.training.objectives.collator import IGNORED, NEGATIVE

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class MaskedInfoNCELoss(nn.Module):
    """In-batch negatives with a mask for passages that are no true negatives.

    For a question q, the relevance r_p of its passages P in the batch (one of them, unless labels are soft) and the set
    N of its negatives there,

        loss(q) = −max_P r · Σ_{p ∈ P} (r_p / Σ_P r) · log( exp(cos(q, p)/τ) / Σ_{p' ∈ P ∪ N} exp(cos(q, p')/τ) ),

    averaged over the questions. With one passage this is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation
    4), weighed by how relevant the passage is; sentence-transformers' MultipleNegativesRankingLoss is the same without
    mask and weights and with one question a passage. With several it is the cross-entropy against a distribution in
    proportion to relevance (Bruch et al. 2019, "An Analysis of the Softmax Cross Entropy Loss for Learning-to-Rank with
    Binary Relevance"); a question weighs as its most relevant passage, however many others chance brings together.

    A question with one passage whose negatives are all masked has loss 0 and no gradient; it counts in the average.

    With several processes (`torch.distributed`), each encodes its share, sees the vectors of all, and computes the loss
    of the whole batch. The gradient reaches its own vectors only and is multiplied by the number of processes, because
    `DistributedDataParallel` divides the sum of the gradients by it: what the optimiser sees is the gradient that one
    process would have with the whole batch.

    Args:
        model: The model to train.
        temperature: τ, above 0.
        cached: Encode one chunk at a time, twice (`gradcache.cached_loss`).
        guide_margin: Ignore negatives whose cosine similarity to the question, in the untuned base, is above that of
            its passage (the lowest, if there are several) less this; curated ones stay. None has no guide.
            (GISTEmbed; Solatorio 2024, arXiv 2402.16829, here with the model's own base for a guide.)
        dims: Add the loss of the first so many dimensions, for each of these (Kusupati et al. 2022, arXiv 2205.13147,
            equation 1; every summand weighs 1, as in the paper and in sentence-transformers' MatryoshkaLoss).

    Attributes:
        prefix: Runs the frozen layers below the first adapted one once for each text; None runs them each time.
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
        self.prefix: HiddenStateCache | None = None

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            features: Token tensors, chunks of questions first, then chunks of passages; of several processes each has
                its share (see `GroupCollator`).
            labels: float [questions, passages] of all processes: above 0 its passage, and how relevant it is (at most
                1); otherwise NEGATIVE, IGNORED or CURATED.

        Returns:
            A scalar, the same in all processes.

        Raises:
            ConfigError: A guide without an adapter to switch off, or GradCache with gradient checkpointing.
        """
        chunks = list(features)
        if self.guide_margin is not None:
            labels = self._without_false(chunks, labels, self.guide_margin)

        def loss_of(vectors: Tensor) -> Tensor:
            return self._loss(*of_all(vectors, *labels.shape), labels)

        if self.cached:
            return cached_loss(self.model, chunks, loss_of, self.prefix)
        return loss_of(embed_all(self.model, chunks, self.prefix))

    def _loss(self, queries: Tensor, passages: Tensor, labels: Tensor) -> Tensor:
        """The loss of vectors [questions, dimension] and [passages, dimension], summed over `dims`."""
        ignored = labels == IGNORED
        relevance = labels.clamp(min=0)
        weight, target = relevance.amax(dim=1), relevance / relevance.sum(dim=1, keepdim=True)
        width = queries.shape[1]
        losses = []
        # float32: a bfloat16 product would round the scores to two digits
        with torch.autocast(queries.device.type, enabled=False):
            for size in sorted({width, *(d for d in self.dims if d < width)}):
                scores = _unit(queries[:, :size]) @ _unit(passages[:, :size]).T / self.temperature
                probabilities = scores.masked_fill(ignored, float("-inf")).log_softmax(dim=1)
                # a masked passage has target 0, and 0 · −∞ would not be 0
                losses.append((weight * -(target * probabilities.masked_fill(ignored, 0.0)).sum(dim=1)).mean())
        return torch.stack(losses).sum()

    def _without_false(self, chunks: Sequence[dict[str, Any]], labels: Tensor, margin: float) -> Tensor:
        """The label with those negatives ignored that the guide takes for answers."""
        with torch.no_grad(), base_alone(unwrapped(self.model)) as base:
            queries, passages = of_all(torch.cat([embed(base, chunk, self.prefix) for chunk in chunks]), *labels.shape)
        with torch.autocast(labels.device.type, enabled=False):
            similar = _unit(queries) @ _unit(passages).T
        lowest = similar.masked_fill(labels <= 0, float("inf")).amin(dim=1, keepdim=True)
        return labels.masked_fill((labels == NEGATIVE) & (similar > lowest - margin), IGNORED)


def of_all(vectors: Tensor, questions: int, passages: int) -> tuple[Tensor, Tensor]:
    """Vectors of all processes in the label's order.

    Args:
        vectors: This process's, [its questions and then its passages, dimension]: of n in all, process r of w has
            those at r, r + w, r + 2w, ...
        questions: Questions of all processes.
        passages: Passages of all processes.

    Returns:
        [questions, dimension] and [passages, dimension]. This process's own have a gradient, w times over.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return vectors[:questions], vectors[questions:]
    own = len(range(dist.get_rank(), questions, dist.get_world_size()))
    return _gathered(vectors[:own], questions), _gathered(vectors[own:], passages)


def _gathered(own: Tensor, total: int) -> Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    missing = -(-total // world) - len(own)  # shares differ by one at most, but all must send the same shape
    sent = nn.functional.pad(own.detach(), (0, 0, 0, missing)).contiguous()
    parts = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(parts, sent)
    if own.requires_grad:
        scaled = own + (world - 1) * (own - own.detach())  # the value of `own`, and w times its gradient
        parts[rank] = nn.functional.pad(scaled, (0, 0, 0, missing))
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


@contextmanager
def base_alone(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its adapters and without dropout; afterwards everything is trained as before.

    peft switches gradients off with the adapters, and on with them again, also where they were off before;
    transformers' `enable_adapters` forgets modules that are trained whole.

    Raises:
        ConfigError: The model has no adapter.
    """
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
    if not layers:
        raise ConfigError("a guide for a model without an adapter", "a model with a LoRA", "Add one, or guide=False.")
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


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors, dim=-1)
