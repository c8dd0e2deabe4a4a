"""Vectors of a batch, with gradients at once or, for batches of any size, in little memory (GradCache)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.training.efficiency.frozen_layers import TEXT_IDS, HiddenStateCache

Chunk = dict[str, Any]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `DistributedDataParallel`, or itself."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def embed(model: nn.Module, chunk: Chunk, prefix: HiddenStateCache | None = None) -> Tensor:
    """Vectors [texts, dimension] of a chunk, in float32; with `prefix`, frozen layers are run once for each text."""
    if prefix is not None:
        output = prefix(model, unwrapped(model), chunk)
    else:  # a copy is passed on, because modules write into it
        output = model({name: value for name, value in chunk.items() if name != TEXT_IDS})
    vectors: Tensor = output["sentence_embedding"]
    return vectors.float()


def embed_all(model: nn.Module, chunks: Sequence[Chunk], prefix: HiddenStateCache | None = None) -> Tensor:
    """Vectors [texts of all chunks, dimension], with gradients.

    Processes can have different numbers of chunks. Only the last one goes through `DistributedDataParallel`, whose
    forward waits for the others; its hooks reduce the gradients of all chunks together.
    """
    inner = unwrapped(model)
    parts = [embed(inner, chunk, prefix) for chunk in chunks[:-1]]
    return torch.cat([*parts, embed(model, chunks[-1], prefix)])


def cached_loss(
    model: nn.Module,
    chunks: Sequence[Chunk],
    loss_of: Callable[[Tensor], Tensor],
    prefix: HiddenStateCache | None = None,
) -> Tensor:
    """A loss over all chunks whose backward pass holds the activations of one chunk at a time.

    With f the model, θ its weights, E = (f_θ(x_1), ..., f_θ(x_n)) the vectors of n chunks and L the loss,

        dL/dθ = Σ_i (∂L/∂E_i) · (∂f_θ(x_i)/∂θ),

    so that ∂L/∂E, which needs the vectors alone, is computed first, and each summand by itself in a second pass
    (Gao et al. 2021, arXiv 2101.06983, section 3). The second pass runs when the returned loss is
    differentiated, and multiplies with the gradient that comes in, which gradient accumulation makes smaller than 1.
    Random state and autocast are those of the first pass, so that dropout drops the same. The activations of the
    largest chunk are kept from the first pass: it goes first in the second, before another takes its room.

    Args:
        model: Takes a chunk; can be wrapped in `DistributedDataParallel`, which then reduces the gradients once.
        chunks: Token tensors, as many texts in each as are to be encoded at once.
        loss_of: The loss of the vectors, float32 [texts, dimension].
        prefix: Runs the frozen layers once for each text.

    Returns:
        A scalar.

    Raises:
        ConfigError: The model has gradient checkpointing on.
    """
    refuse_checkpointing(any(getattr(module, "gradient_checkpointing", False) for module in model.modules()))
    inner = unwrapped(model)
    device_type = next(model.parameters()).device.type
    autocast = _autocast_now(device_type)
    states, first = [], []
    kept = _largest(chunks if inner is model else chunks[:-1]) if torch.is_grad_enabled() else None
    with autocast():
        for number, chunk in enumerate(chunks):
            states.append(_RandomState(chunk))
            with torch.set_grad_enabled(number == kept):
                first.append(embed(inner, chunk, prefix))
    vectors = torch.cat([part.detach() for part in first])
    if not torch.is_grad_enabled():
        return loss_of(vectors)
    vectors.requires_grad_()
    loss = loss_of(vectors)
    with torch.autocast(device_type, enabled=False):  # as a backward pass is, outside of the forward's autocast
        gradients = torch.split(torch.autograd.grad(loss, vectors)[0], [len(part) for part in first])
    graph = [] if kept is None else [first[kept]]
    del first, vectors

    def second_pass(incoming: Tensor) -> None:
        done = None
        if graph and kept is not None:  # a loss that is differentiated again encodes it again
            graph.pop().backward(gradients[kept] * incoming)  # type: ignore[no-untyped-call]
            done = kept
        for number, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients, strict=True)):
            if number == done:
                continue
            # as in `embed_all`: backward passes that DistributedDataParallel did not prepare for only accumulate
            with state.again(), torch.enable_grad(), autocast():
                again = embed(model if number == len(chunks) - 1 else inner, chunk, prefix)
            again.backward(gradient * incoming)  # type: ignore[no-untyped-call]

    result = loss.detach().requires_grad_()
    result.register_hook(second_pass)  # type: ignore[no-untyped-call]
    return result


def _largest(chunks: Sequence[Chunk]) -> int | None:
    """Which chunk has the most tokens, padding included; None of none."""

    def size(number: int) -> int:
        return sum(value.numel() for value in chunks[number].values() if isinstance(value, Tensor))

    return max(range(len(chunks)), key=size, default=None)


def refuse_checkpointing(gradient_checkpointing: bool) -> None:
    """GradCache and gradient checkpointing would compute each activation three times and save little.

    Raises:
        ConfigError: The latter is on.
    """
    if gradient_checkpointing:
        raise ConfigError(
            "mini_batch_size together with gradient_checkpointing",
            "one of the two: both compute activations again to save memory",
            "Leave gradient_checkpointing out, and lower mini_batch_size until the step fits.",
        )


class _RandomState:
    """The state of all generators that a forward pass over a chunk draws from."""

    def __init__(self, chunk: Chunk) -> None:
        self.processor = torch.get_rng_state()
        self.device_type = next((v.device.type for v in chunk.values() if isinstance(v, Tensor)), "cpu")
        self.devices, self.states = get_device_states(*chunk.values())  # none for tensors on the processor

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers once more; what is drawn afterwards is as if nothing had been."""
        kind = "cuda" if self.device_type == "cpu" else self.device_type
        with torch.random.fork_rng(self.devices, device_type=kind):
            torch.set_rng_state(self.processor)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=kind)
            yield


def _autocast_now(device_type: str) -> Callable[[], Any]:
    """Makes contexts with the present autocast, whenever they are entered.

    Without its cache of weights: one that was filled without gradients would cut the second pass off from them.
    """
    if not torch.is_autocast_enabled(device_type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, cache_enabled=False)
