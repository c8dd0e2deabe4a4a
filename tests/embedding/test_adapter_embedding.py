"""An embedding model with an adapter on top of its query vectors."""

import asyncio
import copy
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from llama_index.core import MockEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.core.storage.kvstore import SimpleKVStore

from llama_index_lora_embed import AdapterEmbeddingModel, LinearLayer, LoraEmbedding, TwoLayerNN
from llama_index_lora_embed.core.errors import AdapterError, BaseModelMismatchError, ConfigError
from llama_index_lora_embed.embedding import LinearAdapterEmbeddingModel
from llama_index_lora_embed.embedding.adapter_embedding import PROBE
from llama_index_lora_embed.embedding.identity import query_fingerprint
from llama_index_lora_embed.models.adapter_directory import Manifest, written_now
from llama_index_lora_embed.models.embedding_adapter import save_adapter
from tests.helpers.embedding_models import DIMENSIONS, PaidEmbedding, turned


def save_turned(path, embed_model=None, seed=0):
    """Write a linear adapter that turns vectors; one that records the embedding model, if one is given."""
    layer = LinearLayer(DIMENSIONS, DIMENSIONS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.randn(DIMENSIONS, DIMENSIONS, generator=generator))
    if embed_model is None:
        layer.save(path)
        return layer
    recorded = {
        "class": type(embed_model).__name__,
        "model_name": embed_model.model_name,
        "fingerprint": query_fingerprint(embed_model),
    }
    manifest = Manifest(
        "", {}, {}, [], 0, True, "cosine", embedding_adapter={"embed_model": recorded}, **written_now()
    )  # fmt: skip
    probe = np.array(embed_model.get_query_embedding(PROBE), np.float32)
    save_adapter(layer, path, manifest, probe=probe)
    return layer


@pytest.fixture
def path(tmp_path):
    save_turned(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_queries_go_through_the_adapter_and_passages_do_not(path):
    base = PaidEmbedding()
    model = AdapterEmbeddingModel(base, path)
    query = np.array(base.get_query_embedding("w1 w2"))
    mapped = LinearLayer.load(path)(torch.tensor(query, dtype=torch.float32)).detach().numpy()
    expected = mapped / np.linalg.norm(mapped) * np.linalg.norm(query)
    assert model.get_query_embedding("w1 w2") == pytest.approx(expected.tolist(), abs=1e-6)
    assert model.get_text_embedding("w1 w2") == base.get_text_embedding("w1 w2")
    texts = [f"w{i}" for i in range(9)]
    assert model.get_text_embedding_batch(texts) == base.get_text_embedding_batch(texts)
    plain = AdapterEmbeddingModel(base, path, transform_query=False)
    assert plain.get_query_embedding("w1 w2") == base.get_query_embedding("w1 w2")
    assert LinearAdapterEmbeddingModel is AdapterEmbeddingModel


def test_a_cache_serves_a_vector_only_to_the_adapter_and_the_side_that_computed_it(path, tmp_path):
    save_turned(tmp_path / "other", seed=1)
    base, store = PaidEmbedding(), SimpleKVStore()
    for folder in (path, tmp_path / "other"):
        plain, cached = (AdapterEmbeddingModel(base, folder, embeddings_cache=cache) for cache in (None, store))
        for _ in range(2):  # the second time from the cache
            assert cached.get_text_embedding("w1") == plain.get_text_embedding("w1")
            assert cached.get_query_embedding("w1") == plain.get_query_embedding("w1")
            assert asyncio.run(cached.aget_query_embedding("w1")) == plain.get_query_embedding("w1")
            assert cached.get_text_embedding_batch(["w1", "w2"]) == plain.get_text_embedding_batch(["w1", "w2"])
    assert len(store.get_all("embeddings")) == 4, "two passages, and a query by either adapter"


def test_the_asynchronous_methods_give_the_same(path):
    model = AdapterEmbeddingModel(PaidEmbedding(), path)

    async def embed():
        return (
            await model.aget_query_embedding("w1"),
            await model.aget_text_embedding("w1"),
            await model.aget_text_embedding_batch(["w1", "w2"]),
        )

    assert asyncio.run(embed()) == (
        model.get_query_embedding("w1"),
        model.get_text_embedding("w1"),
        model.get_text_embedding_batch(["w1", "w2"]),
    )


def test_it_survives_pickles_copies_and_dicts_over_a_lora_embedding(tiny_model, tmp_path):
    adapter = TwoLayerNN(32, 8, 32)
    adapter.save(tmp_path / "adapter")
    model = AdapterEmbeddingModel(LoraEmbedding(base_model=tiny_model, device="cpu"), tmp_path / "adapter", TwoLayerNN)
    vector = model.get_query_embedding("w1 w2")
    data = json.loads(json.dumps(model.to_dict()))
    assert data["fingerprint"] == model.fingerprint
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), AdapterEmbeddingModel.from_dict(data)):
        assert other._stored is None or other is not model
        assert other.get_query_embedding("w1 w2") == pytest.approx(vector, abs=1e-6)
        assert other.get_text_embedding("w1") == pytest.approx(model.get_text_embedding("w1"), abs=1e-6)
        assert other.embed_batch_size == 256
    mock = AdapterEmbeddingModel.from_dict(AdapterEmbeddingModel(MockEmbedding(32), tmp_path / "adapter").to_dict())
    assert isinstance(mock.base_embed_model, MockEmbedding)
    with pytest.raises(ConfigError, match="PaidEmbedding"):
        AdapterEmbeddingModel({"class_name": "PaidEmbedding"}, tmp_path / "adapter")


def test_fingerprints_say_which_vectors_change(path, tmp_path):
    base = PaidEmbedding()
    model = AdapterEmbeddingModel(base, path)
    assert model.passage_fingerprint == query_fingerprint(base) != model.fingerprint
    assert AdapterEmbeddingModel(base, path).fingerprint == model.fingerprint
    assert AdapterEmbeddingModel(base, path, transform_query=False).fingerprint == query_fingerprint(base)
    assert AdapterEmbeddingModel(PaidEmbedding(model_name="another"), path).fingerprint != model.fingerprint
    pickled = pickle.dumps(model)
    save_turned(path, seed=1)
    assert AdapterEmbeddingModel(base, path).fingerprint != model.fingerprint
    with pytest.raises(AdapterError, match="recorded when this object was saved"):
        pickle.loads(pickled).get_query_embedding("w1")


def test_another_embedding_model_than_the_one_trained_on_is_refused_by_a_vector(tmp_path):
    class SameByAnotherClass(PaidEmbedding):
        pass

    save_turned(tmp_path / "adapter", PaidEmbedding())
    known, same = PaidEmbedding(), SameByAnotherClass(model_name="moved")
    AdapterEmbeddingModel(known, tmp_path / "adapter")
    assert known.paid == [], "class and settings tell"
    AdapterEmbeddingModel(same, tmp_path / "adapter")
    assert same.paid == [PROBE]
    for other in (PaidEmbedding(model_name="other", turn=0.0), PaidEmbedding(model_name="short", dimensions=12)):
        with pytest.raises(BaseModelMismatchError, match="PaidEmbedding 'paid' with 24 dimensions"):
            AdapterEmbeddingModel(other, tmp_path / "adapter")


def test_vectors_of_other_dimensions_are_refused(path):
    model = AdapterEmbeddingModel(PaidEmbedding(dimensions=12), path)
    with pytest.raises(AdapterError, match="24 to 24 dimensions, and an embedding model with 12"):
        model.get_query_embedding("w1")
    with pytest.raises(ConfigError, match="of type str"):
        AdapterEmbeddingModel("local:somewhere", path)


def test_the_cache_and_the_rate_limiter_of_the_model_below_are_heard(path):
    base = PaidEmbedding(embeddings_cache=SimpleKVStore())
    model = AdapterEmbeddingModel(base, path)
    first = [model.get_query_embedding("w1"), model.get_text_embedding("w2"), *model.get_text_embedding_batch(["w3"])]
    again = [model.get_query_embedding("w1"), model.get_text_embedding("w2"), *model.get_text_embedding_batch(["w3"])]
    assert first == again
    assert base.paid == ["w1", "w2", "w3"]
    limiter = TokenBucketRateLimiter(requests_per_minute=600)
    acquired = []
    limited = PaidEmbedding(rate_limiter=limiter)
    limiter.__class__.acquire, kept = lambda self, *a, **k: acquired.append(1), limiter.__class__.acquire
    try:
        AdapterEmbeddingModel(limited, path).get_query_embedding("w1")
    finally:
        limiter.__class__.acquire = kept
    assert acquired == [1]


def test_the_rotation_that_queries_went_through_can_be_undone(tmp_path):
    base = PaidEmbedding()
    layer = LinearLayer(DIMENSIONS, DIMENSIONS)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.from_numpy(turned().T))
    layer.save(tmp_path / "adapter")
    model = AdapterEmbeddingModel(base, tmp_path / "adapter")
    assert model.get_query_embedding("w1 w2") == pytest.approx(base.get_text_embedding("w1 w2"), abs=1e-5)


def test_inputs_that_are_no_strings_are_refused_before_any_model_sees_them(path, tiny_model, tmp_path):
    LinearLayer(32, 32).save(tmp_path / "small")
    paid = PaidEmbedding()
    own = LoraEmbedding(base_model=tiny_model, device="cpu")
    for model in (AdapterEmbeddingModel(paid, path), AdapterEmbeddingModel(own, tmp_path / "small")):
        for wrong in (None, 7, b"w1", ["w1"]):
            for method in (model.get_query_embedding, model.get_text_embedding):
                with pytest.raises(ConfigError, match="not strings"):
                    method(wrong)
            for method in (model.aget_query_embedding, model.aget_text_embedding):
                with pytest.raises(ConfigError, match="not strings"):
                    asyncio.run(method(wrong))
        with pytest.raises(ConfigError, match="1 of 2 inputs"):
            model.get_text_embedding_batch(["w1", 7])
        with pytest.raises(ConfigError, match="1 of 2 inputs"):
            asyncio.run(model.aget_text_embedding_batch(["w1", None]))
        assert len(model.get_query_embedding("w1 \ud800")) == len(model.get_query_embedding("w1"))
    assert set(paid.paid) == {"w1 \ufffd", "w1"}


def test_a_call_is_one_span_in_a_trace(path, tiny_model):
    models = AdapterEmbeddingModel(PaidEmbedding(), path), LoraEmbedding(base_model=tiny_model, device="cpu")
    handler, root = SimpleSpanHandler(), get_dispatcher("root")
    root.add_span_handler(handler)
    try:
        for model in models:
            model.get_query_embedding("w1")
            model.get_text_embedding("w1")
            model.get_text_embedding_batch(["w1", "w2"])
            asyncio.run(model.aget_query_embedding("w1"))
    finally:
        root.span_handlers.remove(handler)
    seen = Counter(span.id_.split("-")[0] for span in handler.completed_spans)
    for model in models:
        for name in ("get_query_embedding", "get_text_embedding", "get_text_embedding_batch", "aget_query_embedding"):
            assert seen[f"{type(model).__name__}.{name}"] == 1, name
