"""Embedding adapters: their maps, and the directories that they are written to."""

import json
import pickle

import numpy as np
import pytest
import torch
from llama_index.embeddings.adapter import AdapterEmbeddingModel as OldModel
from llama_index.embeddings.adapter.utils import LinearLayer as OldLinearLayer
from llama_index.embeddings.adapter.utils import TwoLayerNN as OldTwoLayerNN
from torch import nn

from llama_index_lora_embed import AdapterEmbeddingModel, BaseAdapter, LinearLayer, LowRankLayer, TwoLayerNN
from llama_index_lora_embed.core.errors import (
    AdapterError,
    ConfigError,
    ModelNotFoundError,
    OutputDirectoryError,
    UnsafeCheckpointError,
)
from llama_index_lora_embed.models.adapter_directory import MAP_WEIGHTS_NAME
from llama_index_lora_embed.models.embedding_adapter import save_adapter
from llama_index_lora_embed.models.stored_adapter import read_adapter
from tests.helpers.embedding_models import DIMENSIONS, PaidEmbedding


class CustomNN(BaseAdapter):
    """An adapter of the user's own."""

    def __init__(self, features: int, slope: float = 0.5) -> None:
        super().__init__()
        self.in_features = self.out_features = features
        self.slope = slope
        self.layer = nn.Linear(features, features)

    def get_config_dict(self):
        return {"features": self.in_features, "slope": self.slope}

    def forward(self, embed):
        return embed + self.slope * torch.tanh(self.layer(embed))


ADAPTERS = {
    "linear": lambda: LinearLayer(DIMENSIONS, DIMENSIONS),
    "bias": lambda: LinearLayer(DIMENSIONS, DIMENSIONS, bias=True),
    "low rank": lambda: LowRankLayer(DIMENSIONS, rank=3),
    "two layers": lambda: TwoLayerNN(DIMENSIONS, 8, DIMENSIONS, activation_fn_str="tanh"),
    "residual": lambda: TwoLayerNN(DIMENSIONS, 8, DIMENSIONS, bias=True, add_residual=True),
    "custom": lambda: CustomNN(DIMENSIONS),
}


def trained(kind):
    """An adapter with random weights."""
    adapter = ADAPTERS[kind]()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return adapter


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(5, DIMENSIONS)).astype(np.float32)


@pytest.mark.parametrize("kind", ["linear", "bias", "low rank", "residual"])
def test_an_adapter_starts_as_the_identity(kind, vectors):
    adapter = ADAPTERS[kind]()
    given = torch.from_numpy(vectors)
    torch.testing.assert_close(adapter(given), given)
    distance = adapter.distance_from_identity()
    assert distance is None if kind == "residual" else distance == 0


@pytest.mark.parametrize("kind", ["linear", "bias", "low rank"])
def test_the_distance_is_that_of_the_matrices(kind):
    adapter = trained(kind)
    with torch.no_grad():
        moved = adapter(torch.cat([torch.eye(DIMENSIONS), torch.zeros(1, DIMENSIONS)]))
        bias = moved[-1]
        expected = (moved[:-1] - bias - torch.eye(DIMENSIONS)).square().sum() + bias.square().sum()
    torch.testing.assert_close(adapter.distance_from_identity().detach(), expected)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_written_adapter_maps_vectors_of_length_1_and_gives_them_their_length_back(kind, vectors, tmp_path):
    adapter = trained(kind)
    adapter.save(tmp_path / "adapter")
    stored = read_adapter(tmp_path / "adapter", CustomNN if kind == "custom" else None)
    assert type(stored.adapter) is type(adapter)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    with torch.no_grad():
        mapped = adapter(torch.from_numpy(vectors / lengths)).numpy()
    expected = mapped / np.linalg.norm(mapped, axis=1, keepdims=True) * lengths
    function = stored.function()
    np.testing.assert_allclose(function(vectors), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(function(vectors[0].tolist()), expected[0], rtol=1e-5, atol=1e-6)
    assert not function(np.zeros((1, DIMENSIONS))).any()


@pytest.mark.parametrize("kind", ["linear", "bias", "two layers", "residual"])
def test_directories_of_llama_index_embeddings_adapter_give_the_same_vectors(kind, tmp_path):
    adapter = trained(kind)
    old_class = OldLinearLayer if isinstance(adapter, LinearLayer) else OldTwoLayerNN
    old = old_class(**adapter.get_config_dict())
    old.load_state_dict(adapter.state_dict())
    old.save(str(tmp_path / "old"))
    model = PaidEmbedding()
    expected = OldModel(model, str(tmp_path / "old"), old_class, device="cpu").get_query_embedding("w1 w2")
    for adapter_cls in (None, type(adapter)):
        found = AdapterEmbeddingModel(model, tmp_path / "old", adapter_cls)
        assert found.manifest is None
        assert found.get_query_embedding("w1 w2") == pytest.approx(expected, abs=1e-5)
    loaded = type(adapter).load(tmp_path / "old")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in adapter.state_dict().items())


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    (tmp_path / "config.json").write_text(json.dumps({"in_features": 4, "out_features": 4}))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UnsafeCheckpointError, match="pickle"):
        read_adapter(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path, adapter):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        LinearLayer.load(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"without finetune\.json"):
        LinearLayer.load(tmp_path)
    with pytest.raises(AdapterError, match="holds a LoRA"):
        LinearLayer.load(adapter)
    trained("custom").save(tmp_path / "custom")
    with pytest.raises(AdapterError, match="Pass adapter_cls=CustomNN"):
        read_adapter(tmp_path / "custom")
    with pytest.raises(AdapterError, match="no LinearLayer"):
        LinearLayer.load(tmp_path / "custom")
    trained("linear").save(tmp_path / "linear")
    weights = tmp_path / "linear" / MAP_WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(AdapterError, match="changed or cut short"):
        LinearLayer.load(tmp_path / "linear")


def test_a_failed_write_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    first = trained("linear")
    first.save(tmp_path / "adapter")

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OutputDirectoryError, match="no space left"):
            trained("bias").save(tmp_path / "adapter")
    assert torch.equal(LinearLayer.load(tmp_path / "adapter").linear.weight, first.linear.weight)
    trained("bias").save(tmp_path / "adapter")
    assert LinearLayer.load(tmp_path / "adapter").bias
    assert not LinearLayer.load(tmp_path / "adapter.previous").bias
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(OutputDirectoryError, match="did not write"):
        first.save(tmp_path / "notes")


def test_an_adapter_that_gained_nothing_is_written_as_the_identity(tmp_path, vectors):
    save_adapter(trained("two layers"), tmp_path / "adapter", identity=True)
    stored = read_adapter(tmp_path / "adapter")
    assert stored.is_identity
    assert stored.digest() == ""
    assert (stored.function()(vectors) == vectors).all()


@pytest.mark.parametrize(
    ("made", "match"),
    [(lambda: LowRankLayer(8, rank=9), "rank=9"), (lambda: TwoLayerNN(8, 8, 8, activation_fn_str="gelu"), "gelu")],
)
def test_arguments_that_make_no_adapter_are_refused(made, match):
    with pytest.raises(ConfigError, match=match):
        made()
