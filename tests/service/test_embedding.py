"""The batcher: requests that come together are computed together, and each gets the vectors that it would get alone."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import AdapterError, BaseModelMismatchError, ConfigError, ModelNotFoundError
from llama_index_lora_embed.embedding.adapter_pool import AdapterPool
from llama_index_lora_embed.service.embedding import Batcher, ServedModel
from tests.conftest import WORDS
from tests.helpers.adapters import TEXTS, distance, plain_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def adapters(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random adapters on the tiny model, with different prompts; "dora" cannot share a forward pass."""
    folder = tmp_path_factory.mktemp("served")
    kinds: dict[str, dict[str, Any]] = {"one": {}, "two": {"r": 4}, "dora": {"use_dora": True}}
    for name, settings in kinds.items():
        plain_adapter(tiny_model, folder / name, lora_alpha=64, **settings)
    return {name: str(folder / name) for name in ("one", "two", "dora")}


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    made = Batcher(wait_s=0.05, device="cpu")
    yield made
    made.close()


@pytest.fixture
def mixed_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of adapters in each call of a pool."""
    calls: list[int] = []
    encode = AdapterPool.encode

    def counting(self: AdapterPool, texts: Any, adapters: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len({a and a.name for a in adapters}))
        return encode(self, texts, adapters, *args, **kwargs)

    monkeypatch.setattr(AdapterPool, "encode", counting)
    return calls


def alone(model: ServedModel, texts: list[str], side: str = "passage", **settings: Any) -> Any:
    embed_model = LoraEmbedding(model.adapter, base_model=model.base, device="cpu", **settings)
    return embed_model._get_query_embeddings(texts) if side == "query" else embed_model._get_text_embeddings(texts)


def test_requests_for_different_adapters_become_one_batch_with_the_vectors_of_each(
    batcher, adapters, tiny_model, mixed_calls
):
    models = [ServedModel(tiny_model), *(ServedModel(tiny_model, adapters[name]) for name in ("one", "two"))]

    async def together() -> Any:
        return await asyncio.gather(*(batcher.embed(m, TEXTS[i : i + 9]) for i, m in enumerate(models)))

    results = asyncio.run(together())
    assert mixed_calls == [3]
    for i, (model, result) in enumerate(zip(models, results, strict=True)):
        assert result.vectors.dtype == np.float32
        assert distance(result.vectors, alone(model, TEXTS[i : i + 9])) < 1e-5
    assert distance(results[0].vectors[1:], results[1].vectors[:-1]) > 1e-3


def test_queries_and_passages_have_their_own_prompts(batcher, adapter, tiny_model, tmp_path):
    prompted = ServedModel(tiny_model, str(shutil.copytree(adapter, tmp_path / "copy")))
    futures = {side: batcher.submit(prompted, ["w1 w2 w3"], side) for side in ("query", "passage")}
    for side, future in futures.items():
        assert distance(future.result().vectors, alone(prompted, ["w1 w2 w3"], side)) < 1e-5


def test_a_model_that_cannot_share_a_pass_is_loaded_alone(batcher, adapters, tiny_model):
    model = ServedModel(tiny_model, adapters["dora"])
    assert distance(batcher.submit(model, TEXTS).result().vectors, alone(model, TEXTS)) < 1e-5
    assert len(batcher._models._loaded) == 2


def test_a_broken_adapter_fails_its_own_request_alone(batcher, adapters, tiny_model, tmp_path):
    broken = shutil.copytree(adapters["one"], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    futures = [
        batcher.submit(ServedModel(tiny_model, path), ["w1"])
        for path in (adapters["one"], str(broken), str(tmp_path / "missing"), adapters["two"])
    ]
    for future in futures[::3]:
        assert future.result().vectors.shape == (1, 32)
    with pytest.raises(AdapterError, match="broken"):
        futures[1].result()
    with pytest.raises(ModelNotFoundError, match="missing"):
        futures[2].result()


def test_an_error_within_a_mixed_batch_fails_only_the_request_at_fault(batcher, adapters, tiny_model, tmp_path):
    """An adapter that was registered whole, and damaged before its weights were loaded."""
    damaged = tmp_path / "damaged"
    plain_adapter(tiny_model, damaged, r=3)
    batcher._models.find(ServedModel(tiny_model, str(damaged)))
    config = damaged / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 3', '"r": 1'))
    good = batcher.submit(ServedModel(tiny_model, adapters["one"]), ["w1"])
    bad = batcher.submit(ServedModel(tiny_model, str(damaged)), ["w1"])
    too_wide = batcher.submit(ServedModel(tiny_model), ["w1"], dimensions=33)
    assert distance(good.result().vectors, alone(ServedModel(tiny_model, adapters["one"]), ["w1"])) < 1e-5
    with pytest.raises(AdapterError, match="has changed"):
        bad.result()
    with pytest.raises(ConfigError, match="dimensions=33; expected at most 32"):
        too_wide.result()


def test_an_adapter_of_another_base_is_refused(batcher, adapter, other_tiny_model):
    with pytest.raises(BaseModelMismatchError):
        batcher.submit(ServedModel(other_tiny_model, str(adapter)), ["w1"]).result()


def test_an_adapter_that_was_retrained_at_its_place_has_its_new_vectors(batcher, adapters, tiny_model, tmp_path):
    path = shutil.copytree(adapters["one"], tmp_path / "adapter")
    model = ServedModel(tiny_model, str(path))
    before = batcher.submit(model, TEXTS).result().vectors
    shutil.rmtree(path)
    plain_adapter(tiny_model, path, r=8, lora_alpha=64)
    after = batcher.submit(model, TEXTS).result().vectors
    assert distance(before, after) > 1e-3
    assert distance(after, alone(model, TEXTS)) < 1e-5


def test_dimensions_are_the_first_ones_as_with_truncate_dim(batcher, tiny_model):
    model = ServedModel(tiny_model)
    cut = batcher.submit(model, TEXTS, dimensions=8).result().vectors
    assert distance(cut, alone(model, TEXTS, truncate_dim=8)) < 1e-5


def test_tokens_are_the_tokenizers_and_truncated_texts_are_counted(batcher, tiny_model):
    long = " ".join(WORDS[:20])  # the model reads 16 tokens, 2 of which are special
    result = batcher.submit(ServedModel(tiny_model), ["w1 w2 w3", long]).result()
    assert (result.tokens, result.truncated) == (3 + 20 + 2 * 2, 1)


def test_a_large_request_shares_each_round_with_small_ones(batcher, tiny_model):
    model = ServedModel(tiny_model)
    order = []
    large = batcher.submit(model, TEXTS * 40)
    large.add_done_callback(lambda future: order.append("large"))
    small = [batcher.submit(model, [text]) for text in TEXTS[:3]]
    for future in small:
        future.add_done_callback(lambda future: order.append("small"))
    assert distance(large.result().vectors, alone(model, TEXTS * 40)) < 1e-5
    assert [future.result().vectors.shape for future in small] == [(1, 32)] * 3
    assert order == ["small"] * 3 + ["large"]


def test_the_least_recently_used_model_is_freed(tiny_model, other_tiny_model):
    batcher = Batcher(max_models=1, device="cpu")
    for base in (tiny_model, other_tiny_model, tiny_model):
        assert batcher.submit(ServedModel(base), ["w1"]).result().vectors.shape == (1, 32)
        assert list(batcher._models._loaded) == [(base,)]
    batcher.close()


def test_a_request_that_its_caller_gives_up_is_not_computed(batcher, tiny_model, mixed_calls):
    future = batcher.submit(ServedModel(tiny_model), ["w1"])
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    assert len(batcher.submit(ServedModel(tiny_model), ["w2"]).result().vectors) == 1
    assert mixed_calls == [1]


def test_a_closed_batcher_refuses_requests(tiny_model):
    batcher = Batcher(device="cpu")
    batcher.submit(ServedModel(tiny_model), ["w1"]).result()
    batcher.close()
    with pytest.raises(ConfigError, match="closed"):
        batcher.submit(ServedModel(tiny_model), ["w1"])


def test_rank_stabilised_adapters_share_a_batch(batcher, tiny_model, tmp_path):
    plain_adapter(tiny_model, tmp_path / "rs", use_rslora=True, lora_alpha=3)
    assert LoraConfig.from_pretrained(str(tmp_path / "rs")).use_rslora
    model = ServedModel(tiny_model, str(Path(tmp_path / "rs")))
    assert distance(batcher.submit(model, TEXTS).result().vectors, alone(model, TEXTS)) < 1e-5
    assert len(batcher._models._loaded) == 1
