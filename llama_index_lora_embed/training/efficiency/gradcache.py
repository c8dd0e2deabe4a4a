"""Embeddings of a batch with their gradients: all at once, or chunk by chunk in little memory (GradCache)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from llama_index_lora_embed.core.memory import return_freed_memory
from llama_index_lora_embed.models.kernels.activations import Activations
from llama_index_lora_embed.training.efficiency.frozen_layers import TEXT_IDS, HiddenStateCache

Chunk = dict[str, Any]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, or the model itself."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def embed(model: nn.Module, chunk: Chunk, hidden_state_cache: HiddenStateCache | None = None) -> Tensor:
    """Embeddings of a chunk, float32 [texts, dimension]."""
    if hidden_state_cache is not None:
        output = hidden_state_cache(model, unwrapped(model), chunk)
    else:  # a copy, because modules write into it
        output = model({name: value for name, value in chunk.items() if name != TEXT_IDS})
    embeddings: Tensor = output["sentence_embedding"]
    return embeddings.float()


def embed_all(model: nn.Module, chunks: Sequence[Chunk], hidden_state_cache: HiddenStateCache | None = None) -> Tensor:
    """Embeddings [texts of all chunks, dimension], with gradients.

    Processes can have different numbers of chunks. Only the last chunk goes through `DistributedDataParallel`, whose
    forward pass waits for the other processes; its hooks reduce the gradients of all chunks together.
    """
    inner = unwrapped(model)
    parts = [embed(inner, chunk, hidden_state_cache) for chunk in chunks[:-1]]
    return torch.cat([*parts, embed(model, chunks[-1], hidden_state_cache)])


def cached_loss(
    model: nn.Module,
    chunks: Sequence[Chunk],
    loss_of: Callable[[Tensor], Tensor],
    hidden_state_cache: HiddenStateCache | None = None,
    kept: KeptActivations | None = None,
) -> Tensor:
    """A loss over all chunks whose backward pass holds the activations of few chunks at a time.

    With f the model, θ its weights, E = (f_θ(x_1), ..., f_θ(x_n)) the embeddings of n chunks and L the loss,

        dL/dθ = Σ_i (∂L/∂E_i) · (∂f_θ(x_i)/∂θ),

    so that ∂L/∂E, which needs the embeddings alone, is computed first, and each summand by itself in a second pass
    (Gao et al. 2021, arXiv 2101.06983, section 3). The second pass runs when the returned loss is differentiated, and
    multiplies by the incoming gradient, which gradient accumulation makes smaller than 1. Random state and autocast
    are those of the first pass, so dropout drops the same units. Chunks whose activations are kept from the first pass
    are not encoded twice: the largest, and next ones as `kept` says. Larger chunks go first in the second pass, so that
    those are over before other chunks take memory.

    Args:
        model: May be wrapped in `DistributedDataParallel`, which then reduces the gradients once.
        chunks: Token tensors, with as many texts in each as are to be encoded at once.
        loss_of: The loss of embeddings, float32 [texts, dimension].
        hidden_state_cache: Computes the frozen layers once per text.
        kept: How activations are kept; None keeps those of the largest chunk, in float32.
    """
    inner = unwrapped(model)
    device_type = next(model.parameters()).device.type
    autocast = _current_autocast(device_type)
    states, first = [], []
    candidates = range(len(chunks) if inner is model else len(chunks) - 1) if torch.is_grad_enabled() else ()
    sizes = {number: _size(chunks[number]) for number in candidates}
    order = sorted(sizes, key=lambda number: -sizes[number])
    whole = set(order[:1]) if kept is None else kept.choose(sizes)
    order += [number for number in range(len(chunks)) if number not in sizes]
    step = None if kept is None else kept.step
    keeping = nullcontext if kept is None else kept.keeping
    with autocast():
        for number, chunk in enumerate(chunks):
            states.append((torch.get_rng_state(), *get_device_states(*chunk.values())))
            with torch.set_grad_enabled(number in whole), keeping(sizes[number]) if number in whole else nullcontext():
                first.append(embed(inner, chunk, hidden_state_cache))
    embeddings = torch.cat([part.detach() for part in first])
    if not torch.is_grad_enabled():
        return loss_of(embeddings)
    embeddings.requires_grad_()
    loss = loss_of(embeddings)
    with torch.autocast(device_type, enabled=False):  # like a backward pass, outside the forward pass's autocast
        gradients = torch.split(torch.autograd.grad(loss, embeddings)[0], [len(part) for part in first])
    graphs = {number: first[number] for number in whole}
    del first, embeddings

    def second_pass(incoming: Tensor) -> None:
        # in an order that does not depend on what is kept, because sums of gradients would differ in their last digits
        for number in order:
            # neither where a loss is differentiated a second time, nor after another loss, which used the same memory
            if number in graphs and (kept is None or kept.step == step):
                graphs.pop(number).backward(gradients[number] * incoming)  # type: ignore[no-untyped-call]
                continue
            if kept is not None:
                kept.clear()
            chunk = chunks[number]
            # as in `embed_all`: only the last chunk's backward pass is reduced by DistributedDataParallel
            same = _same_random_numbers(*states[number], device_type)
            with same, torch.enable_grad(), autocast(), keeping(_size(chunk)):
                again = embed(model if number == len(chunks) - 1 else inner, chunk, hidden_state_cache)
            again.backward(gradients[number] * incoming)  # type: ignore[no-untyped-call]
        if kept is not None and not graphs:
            kept.free()

    result = loss.detach().requires_grad_()
    result.register_hook(second_pass)  # type: ignore[no-untyped-call]
    return result


class KeptActivations:
    """Which chunks' activations are kept from the first pass: as many as a number of bytes holds.

    Args:
        model: Whose passes they are.
        limit: Bytes for the activations of all chunks that are kept; the largest chunk's are kept in any case.

    Attributes:
        per_token: Bytes of activations per token, the most that so many tokens as in the largest chunk took so far; 0
            before the first step, which keeps that chunk alone.
        step: Number of times that what was kept has been dropped: who notes it knows later whether it is still there.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        self.activations = Activations(model)
        self.limit = limit
        self.per_token = 0.0
        self.step = 0
        self._tokens = self._most = 0

    def choose(self, sizes: dict[int, int]) -> set[int]:
        """Numbers of the chunks to keep, from the tokens of each: the largest, and the next while there is room.

        What was kept before is dropped.
        """
        self.clear()
        order = sorted(sizes, key=lambda number: -sizes[number])
        self._most = sizes[order[0]] if order else 0
        kept = 1
        while kept < len(order) and 0 < self.per_token * sum(sizes[i] for i in order[: kept + 1]) <= self.limit:
            kept += 1
        return set(order[:kept])

    def clear(self) -> None:
        """Drop what is kept; its memory is used again."""
        self._learn()
        self.activations.clear()

    def free(self) -> None:
        """Drop what is kept, after a step, so that an evaluation does not find its memory taken."""
        self._learn()
        self.activations.free()
        return_freed_memory()

    def _learn(self) -> None:
        if self._tokens and self._tokens >= self._most:
            self.per_token = max(self.per_token, self.activations.bytes / self._tokens)
        self._tokens = 0
        self.step += 1

    @contextmanager
    def keeping(self, tokens: int) -> Iterator[None]:
        """Within it, a forward pass of so many tokens keeps its activations."""
        self._tokens += tokens
        with self.activations.halved():
            yield


def _size(chunk: Chunk) -> int:
    """Tokens of a chunk, without padding."""
    return int(chunk["attention_mask"].sum()) if "attention_mask" in chunk else 1


@contextmanager
def _same_random_numbers(cpu: Tensor, devices: list[int], states: list[Tensor], device_type: str) -> Iterator[None]:
    """Within it random numbers are drawn from these states; the states afterwards are what they were before."""
    kind = "cuda" if device_type == "cpu" else device_type
    with torch.random.fork_rng(devices, device_type=kind):
        torch.set_rng_state(cpu)
        if devices:
            set_device_states(devices, states, device_type=kind)
        yield


def _current_autocast(device_type: str) -> Callable[[], Any]:
    """A factory of contexts with the present autocast settings, to be entered later.

    The contexts have no cache of cast weights: one that was filled without gradients would detach the second pass from
    the weights.
    """
    if not torch.is_autocast_enabled(device_type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, cache_enabled=False)
