"""Embedding adapters: small maps on top of an embedding model's query vectors. Importing this module imports torch.

`LinearLayer`, `TwoLayerNN` and `BaseAdapter` have the arguments and the weights of the classes in
llama-index-embeddings-adapter, so that what was trained with those is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llama_index_lora_embed.core.errors import AdapterError, ConfigError
from llama_index_lora_embed.models.adapter_directory import Manifest, written_now
from llama_index_lora_embed.models.embedding_adapter_directory import (
    AdapterFiles,
    FloatArray,
    read_directory,
    write_directory,
)

_Adapter = TypeVar("_Adapter", bound="BaseAdapter")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": nn.functional.leaky_relu,
}


class BaseAdapter(nn.Module):
    """A map of vectors; subclass it with `get_config_dict` and `forward` for a map of your own.

    Attributes:
        in_features: Dimensions of the vectors that it takes.
        out_features: Dimensions of the vectors that it returns; for queries they must be those of the passages.
    """

    in_features: int
    out_features: int

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments that make an adapter of this shape, as JSON values."""
        raise NotImplementedError

    def forward(self, embed: Tensor) -> Tensor:
        """Map vectors [..., in_features] to [..., out_features]."""
        raise NotImplementedError

    def distance_from_identity(self) -> Tensor | None:
        """The squared Frobenius distance of the map to the identity, a scalar; None if it is not linear."""
        return None

    def save(self, output_path: str | os.PathLike[str]) -> None:
        """Write the adapter as a directory that `load` and `AdapterEmbeddingModel` read; one that is there is replaced.

        Raises:
            OutputDirectoryError: It cannot be written, or other files are there.
        """
        save_adapter(self, output_path)

    @classmethod
    def load(cls: type[_Adapter], input_path: str | os.PathLike[str]) -> _Adapter:
        """Read an adapter of this class, also one that llama-index-embeddings-adapter wrote.

        Raises:
            ModelNotFoundError: There is no such directory.
            AdapterError: It is damaged, or holds an adapter of another class.
            UnsafeCheckpointError: It holds a pickle of more than tensors.
        """
        return made_of(read_directory(input_path), cls)


class LinearLayer(BaseAdapter):
    """W x, or W x + b with a bias; it starts as the identity.

    Args:
        in_features: Dimensions of the vectors.
        out_features: Dimensions of the result.
        bias: Whether there is a b.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = bias
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        with torch.no_grad():
            nn.init.eye_(self.linear.weight)
            if bias:
                nn.init.zeros_(self.linear.bias)

    def forward(self, embed: Tensor) -> Tensor:
        """W x + b."""
        mapped: Tensor = self.linear(embed)
        return mapped

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments."""
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias}

    def distance_from_identity(self) -> Tensor:
        """|W - I|² + |b|²."""
        weight = self.linear.weight
        distance = (weight - torch.eye(*weight.shape, device=weight.device)).square().sum()
        return distance + self.linear.bias.square().sum() if self.bias else distance


class LowRankLayer(BaseAdapter):
    """x + B A x, with A [rank, features] and B [features, rank]; it starts as the identity.

    Args:
        in_features: Dimensions of the vectors and of the result.
        rank: Number of rows of A. Fewer than a linear map's weights if it is below half of the dimensions.
    """

    def __init__(self, in_features: int, rank: int = 32) -> None:
        super().__init__()
        if not 1 <= rank <= in_features:
            raise ConfigError(f"rank={rank!r}", f"a number from 1 to in_features ({in_features})", "rank=32")
        self.in_features = self.out_features = in_features
        self.rank = rank
        start = torch.randn(rank, in_features, generator=torch.Generator().manual_seed(0)) / in_features**0.5
        self.down = nn.Parameter(start)
        self.up = nn.Parameter(torch.zeros(in_features, rank))

    def forward(self, embed: Tensor) -> Tensor:
        """X + B A x."""
        return embed + (embed @ self.down.T) @ self.up.T

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments."""
        return {"in_features": self.in_features, "rank": self.rank}

    def distance_from_identity(self) -> Tensor:
        """|B A|², from two matrices [rank, rank]."""
        return ((self.up.T @ self.up) * (self.down @ self.down.T)).sum()


class TwoLayerNN(BaseAdapter):
    """W2 g(W1 x + b1) + b2; with `add_residual`, x + w (W2 g(W1 x + b1) + b2), which starts as the identity (w = 0).

    Args:
        in_features: Dimensions of the vectors.
        hidden_features: Rows of W1.
        out_features: Dimensions of the result.
        bias: Without effect, as in llama-index-embeddings-adapter: both layers have a bias.
        activation_fn_str: g, one of `ACTIVATIONS`.
        add_residual: Whether x is added. Without it the start is random, and few queries do not teach a whole space.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        bias: bool = False,
        activation_fn_str: str = "relu",
        add_residual: bool = False,
    ) -> None:
        super().__init__()
        if activation_fn_str not in ACTIVATIONS:
            raise ConfigError(
                f"activation_fn_str={activation_fn_str!r}", f"one of {', '.join(ACTIVATIONS)}", "'relu' is the default."
            )
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = out_features
        self.bias = bias
        self.activation_fn_str = activation_fn_str
        self.add_residual = add_residual
        self.linear1 = nn.Linear(in_features, hidden_features)
        self.linear2 = nn.Linear(hidden_features, out_features)
        self.residual_weight = nn.Parameter(torch.zeros(1))

    def forward(self, embed: Tensor) -> Tensor:
        """The map."""
        mapped: Tensor = self.linear2(ACTIVATIONS[self.activation_fn_str](self.linear1(embed)))
        return embed + self.residual_weight * mapped if self.add_residual else mapped

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments."""
        names = ("in_features", "hidden_features", "out_features", "bias", "activation_fn_str", "add_residual")
        return {name: getattr(self, name) for name in names}


class LinearThenResidual(BaseAdapter):
    """y + w (W2 g(W1 y + b1) + b2) of y = W x + b: a `LinearLayer` into a space, and a `TwoLayerNN` within it.

    Args:
        in_features: Dimensions of the vectors.
        hidden_features: Rows of W1.
        out_features: Dimensions of the result.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = out_features
        self.first = LinearLayer(in_features, out_features, bias=True)
        self.then = TwoLayerNN(out_features, hidden_features, out_features, add_residual=True)

    def forward(self, embed: Tensor) -> Tensor:
        """The map."""
        mapped: Tensor = self.then(self.first(embed))
        return mapped

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments."""
        return {name: getattr(self, name) for name in ("in_features", "hidden_features", "out_features")}


KINDS: dict[str, type[BaseAdapter]] = {
    "linear": LinearLayer,
    "low_rank": LowRankLayer,
    "two_layer": TwoLayerNN,
    "linear_then_residual": LinearThenResidual,
}
"""The adapters of this package by the name that a directory records."""


def kind_of(cls: type[BaseAdapter]) -> str:
    """The recorded name of an adapter's class; for a class of the user's own the name that Python knows it by."""
    return next((kind for kind, known in KINDS.items() if known is cls), f"{cls.__module__}.{cls.__qualname__}")


def adapter_digest(adapter: BaseAdapter) -> str:
    """SHA-256 (hex) of an adapter's class, arguments and weights."""
    digest = hashlib.sha256(json.dumps([kind_of(type(adapter)), adapter.get_config_dict()], sort_keys=True).encode())
    for name, tensor in sorted(adapter.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def made_of(found: AdapterFiles, adapter_cls: type[_Adapter]) -> _Adapter:
    """The adapter of a class with the weights of a directory.

    Raises:
        AdapterError: They do not fit the class.
    """
    try:
        adapter = adapter_cls(**found.arguments)
        adapter.load_state_dict(found.state)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise AdapterError(
            f"{found.place!r} with an adapter that is no {getattr(adapter_cls, '__name__', adapter_cls)} "
            f"({str(error).splitlines()[0]})",
            "the class that was saved",
            "Pass its class as adapter_cls.",
        ) from error
    return adapter


def save_adapter(
    adapter: BaseAdapter,
    path: str | os.PathLike[str],
    manifest: Manifest | None = None,
    *,
    probe: FloatArray | None = None,
    identity: bool = False,
) -> None:
    """Write an adapter directory.

    Args:
        adapter: With its weights.
        path: The directory; an adapter that is there is kept as `<name>.previous`.
        manifest: How it was made; None if nothing is known.
        probe: Vector of a known query by the embedding model that it was trained on.
        identity: Whether training gained nothing, so that vectors are to stay as they are.

    Raises:
        OutputDirectoryError: It cannot be written; what was there is unchanged.
    """
    if manifest is None:
        manifest = Manifest(adapter_digest(adapter), {}, {}, [], 0, True, "cosine", tune="query", **written_now())
    facts = {"kind": kind_of(type(adapter)), "arguments": adapter.get_config_dict(), "identity": identity}
    manifest = replace(manifest, embedding_adapter={**manifest.embedding_adapter, **facts})
    write_directory(path, adapter.state_dict(), manifest, probe)


def check_shape(adapter: BaseAdapter, dimensions: int, where: str, returned: int | None = None) -> None:
    """Check that an adapter maps vectors of so many dimensions to ones that can be compared with the passages'.

    Args:
        adapter: With the dimensions that it takes and returns, as far as its class records them.
        dimensions: Of the embedding model's vectors.
        where: What the adapter is, for the message.
        returned: Dimensions of the passages' vectors; None if they are the model's, too.

    Raises:
        AdapterError: It does not.
    """
    shape = tuple(getattr(adapter, name, dimensions) for name in ("in_features", "out_features"))
    returned = dimensions if returned is None else returned
    if shape != (dimensions, returned):
        raise AdapterError(
            f"{where} from {shape[0]} to {shape[1]} dimensions, and an embedding model with {dimensions}",
            f"an adapter from {dimensions} to {returned} dimensions",
            "Use the embedding model that it was trained on.",
        )
