"""Merging adapters: the arithmetic."""

import json
import shutil

import pytest
import torch
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from peft import PeftModel
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config import DEFAULT_BASE
from llama_index_lora_embed.core.errors import (
    WrongIndexError,
)
from llama_index_lora_embed.deployment import merge_adapters, stamp_index, verify_index
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.conftest import WORDS, make_engine
from tests.helpers.adapters import TEXTS, distance, plain_adapter, random_adapter, vectors, weight_changes


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """Adapters that differ in rank, alpha, scaling and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = {
        "a": {},
        "b": {},
        "low": {"r": 2},
        "rslora": {"r": 6, "use_rslora": True, "lora_alpha": 4},
        "patterns": {"rank_pattern": {"value": 3}, "alpha_pattern": {"value": 5, "layer.1.attention.self.query": 2}},
        "other modules": {"target_modules": ["dense"], "r": 3},
        "one layer": {"target_modules": ["query"], "layers_to_transform": [1]},
    }
    made = enumerate(settings.items())
    return {name: random_adapter(tiny_model, folder / name, seed, **own) for seed, (name, own) in made}


@pytest.fixture(scope="module")
def a(made):
    return made["a"]


@pytest.fixture(scope="module")
def b(made):
    return made["b"]


def changed_base(tiny_model, adapters, weights):
    """Vectors of the base with the weighted sum of the weight changes added to its own weights."""
    model = SentenceTransformer(tiny_model, device="cpu")
    with torch.no_grad():
        for path, weight in zip(adapters, weights, strict=True):
            for module, change in weight_changes(path).items():
                model.transformers_model.get_submodule(module).weight += weight * change
    return model.encode(TEXTS, prompt="")


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["a", "b"], [0.5, 0.5]),
        (["a", "b"], [0.9, -0.4]),
        (["a", "low", "rslora"], [0.2, 0.3, 0.4]),
        (["a", "patterns"], [0.6, 0.4]),
        (["a", "other modules"], [0.6, 0.4]),
        (["one layer", "other modules", "patterns"], [0.5, 1.5, 0.0]),
    ],
)
def test_merged_vectors_are_those_of_the_base_with_the_weighted_sum_of_the_changes(
    made, tiny_model, tmp_path, names, weights
):
    paths = [made[name] for name in names]
    merged = merge_adapters(paths, tmp_path / "merged", weights=weights)
    expected = changed_base(tiny_model, paths, weights)
    assert distance(vectors(merged.path), expected) < 1e-5
    assert distance(vectors(merged.path, merge=False), expected) < 1e-5
    assert distance(SentenceTransformer(merged.path, device="cpu").encode(TEXTS), expected) < 1e-5
    assert min(distance(expected, vectors(path)) for path in paths) > 1e-2
    assert merged.kept == 1
    assert LoraEmbedding(merged.path, device="cpu").fingerprint == merged.fingerprint


def test_the_default_is_the_mean(a, b, tiny_model, tmp_path):
    merged = merge_adapters([a, b], tmp_path / "merged")
    assert merged.weights == (0.5, 0.5)
    assert merged.rank == 8
    assert distance(vectors(merged.path), changed_base(tiny_model, [a, b], [0.5, 0.5])) < 1e-5


def test_weight_1_alone_gives_the_adapters_own_vectors(a, b, tmp_path):
    merged = merge_adapters([a, b], tmp_path / "merged", weights=[1, 0])
    assert distance(vectors(merged.path), vectors(a)) < 1e-5
    assert merged.rank == 4, "the other one takes no room"


def test_one_adapter_at_a_half_is_that_adapter_at_scale_a_half(a, tmp_path):
    for combination in ("linear", "ties"):
        merged = merge_adapters([a], tmp_path / "merged", weights=[0.5], combination=combination)
        assert distance(vectors(merged.path), vectors(a, adapter_scale=0.5)) < 1e-5


def test_a_merge_of_merges_is_the_merge_of_all(made, tmp_path):
    a, b, c = (made[name] for name in ("a", "b", "other modules"))
    merge_adapters([a, b], tmp_path / "pair", weights=[0.4, 0.6])
    merge_adapters([tmp_path / "pair", c], tmp_path / "twice", weights=[0.5, 0.8])
    merge_adapters([a, b, c], tmp_path / "once", weights=[0.2, 0.3, 0.8])
    assert distance(vectors(tmp_path / "twice"), vectors(tmp_path / "once")) < 1e-5


def test_ranks_beyond_the_width_of_a_module_are_not_stored(a, b, tmp_path):
    many = merge_adapters([a, b] * 6, tmp_path / "many")
    assert many.rank == 32
    assert many.kept > 1 - 1e-6
    assert distance(vectors(many.path), vectors(merge_adapters([a, b], tmp_path / "two").path)) < 1e-5


def test_a_lower_rank_keeps_the_largest_singular_values(a, b, tmp_path):
    exact = weight_changes(merge_adapters([a, b], tmp_path / "exact").path)
    low = merge_adapters([a, b], tmp_path / "low", rank=3)
    found = weight_changes(low.path)
    assert low.rank == 3
    values = {name: torch.linalg.svdvals(change).square() for name, change in exact.items()}
    for name, change in exact.items():
        assert float((change - found[name]).square().sum()) == pytest.approx(float(values[name][3:].sum()), rel=1e-3)
    kept = sum(float(v[:3].sum()) for v in values.values()) / sum(float(v.sum()) for v in values.values())
    assert 0.3 < low.kept < 0.95
    assert low.kept == pytest.approx(kept, abs=1e-4)
    assert f"{low.kept:.1%}" in str(low)


def in_peft(paths, **settings):
    """Weight changes that peft's own `add_weighted_adapter` gives."""
    base = json.loads((paths[0] / "finetune.json").read_text())["base"]["model_id"]
    model = PeftModel.from_pretrained(SentenceTransformer(base).transformers_model, paths[0], adapter_name="0")
    for number, path in enumerate(paths[1:], start=1):
        model.load_adapter(path, adapter_name=str(number))
    model.add_weighted_adapter([str(i) for i in range(len(paths))], adapter_name="merged", **settings)
    layers = model.get_base_model().named_modules()
    return {
        name: layer.get_delta_weight("merged").detach()
        for name, layer in layers
        if hasattr(layer, "get_delta_weight") and "merged" in layer.scaling
    }


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_that_of_peft_on_the_weight_changes(a, b, tmp_path, density):
    expected = in_peft([a, b], weights=[1.0, 1.0], combination_type="ties_svd", density=density, svd_rank=32)
    merged = merge_adapters([a, b], tmp_path / "merged", combination="ties", density=density, rank=32)
    found = weight_changes(merged.path)
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert torch.allclose(found[name], change, atol=1e-5)


def test_linear_is_pefts_cat_and_not_pefts_linear(a, b, tmp_path):
    found = weight_changes(merge_adapters([a, b], tmp_path / "merged").path)
    cat, linear = (in_peft([a, b], weights=[0.5, 0.5], combination_type=kind) for kind in ("cat", "linear"))
    for name, change in found.items():
        assert torch.allclose(cat[name], change, atol=1e-6)
        assert float((linear[name] - change).norm() / change.norm()) > 0.5, "cross terms of the two adapters"
    twice = in_peft([a, a], weights=[0.5, 0.5], combination_type="linear")
    for name, change in weight_changes(a).items():
        assert torch.allclose(twice[name], 2 * change, atol=1e-5)


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties"])
def test_where_adapters_agree_every_combination_is_their_weighted_sum(a, tmp_path, combination):
    merged = merge_adapters(
        [a, a], tmp_path / "merged", weights=[0.2, 0.5], combination=combination, density=1.0, rank=32
    )
    assert distance(vectors(merged.path), vectors(a, adapter_scale=0.7)) < 1e-5


def test_ties_keeps_a_change_that_no_other_adapter_makes(made, tmp_path):
    alone = made["other modules"]
    merged = merge_adapters([made["a"], alone], tmp_path / "merged", combination="ties", density=1.0, rank=32)
    found = weight_changes(merged.path)
    for name, change in weight_changes(alone).items():
        assert torch.allclose(found[name], change, atol=1e-5)


def test_dare_drops_entries_at_random_and_rescales_the_rest(made, tmp_path):
    paths = [made["a"], made["other modules"]]

    def merge(name, **settings):
        path = merge_adapters(paths, tmp_path / name, combination="dare_linear", rank=32, **settings).path
        return weight_changes(path)

    once, again, other = merge("once", density=0.25), merge("again", density=0.25), merge("other", density=0.25, seed=1)
    for path in paths:
        for name, change in weight_changes(path).items():
            rescaled = 0.5 * change / 0.25
            dropped = once[name].abs() < 1e-5
            assert torch.allclose(once[name][~dropped], rescaled[~dropped], atol=1e-4)
            assert 0.6 < float(dropped.float().mean()) < 0.9
    assert all(once[name].equal(again[name]) for name in once)
    assert not any(torch.allclose(once[name], other[name]) for name in once)


def test_a_merged_adapter_is_pooled_continued_and_stamped_like_any_other(a, made, tmp_path):
    path = merge_adapters([a, made["other modules"]], tmp_path / "merged").path
    pooled = LoraEmbedding(adapters={"a": a, "merged": path}, device="cpu")
    mixed = pooled.get_mixed_embeddings(TEXTS[:4], ["a", "merged", None, "merged"])
    assert distance(mixed[1], vectors(path)[1]) < 1e-5
    assert distance(mixed[0], vectors(a)[0]) < 1e-5
    embed_model = LoraEmbedding(path, device="cpu")
    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=embed_model)
    stamp_index(index, embed_model)
    verify_index(index, embed_model)
    with pytest.raises(WrongIndexError):
        verify_index(index, LoraEmbedding(a, device="cpu"))
    before = weight_changes(path)
    settings = {"continue_from": path, "epochs": 1, "val_fraction": 0.0, "val_dataset": None}
    make_engine(DEFAULT_BASE, tmp_path / "child", **settings).finetune()
    assert Manifest.read(tmp_path / "child").parent["path"] == path
    after = weight_changes(tmp_path / "child")
    assert any(not torch.allclose(after[name], before[name]) for name in before)


def test_adapters_of_sentence_transformers_and_of_peft_alone_are_merged(a, tiny_model, tmp_path):
    plain_adapter(tiny_model, tmp_path / "plain")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "plain" / name, bare / name)
    expected = changed_base(tiny_model, [a, tmp_path / "plain"], [0.5, 0.5])
    for other in ("plain", "bare"):
        merge_adapters([tmp_path / other, a], tmp_path / "merged")
        assert distance(vectors(tmp_path / "merged"), expected) < 1e-5
        assert Manifest.read(tmp_path / "merged").parents[0]["fingerprint"] is None


def test_adapters_that_change_nothing_are_merged(a, tiny_model, tmp_path):
    for name, learning_rate in (("x", 1e-10), ("y", 1e-10)):
        make_engine(tiny_model, tmp_path / name, epochs=1, learning_rate=learning_rate).finetune()
    assert Manifest.read(tmp_path / "x").best_step == 0
    merge_adapters([tmp_path / "x", tmp_path / "y"], tmp_path / "nothing")
    assert distance(vectors(tmp_path / "nothing"), vectors(base_model=tiny_model)) < 1e-6
    assert Manifest.read(tmp_path / "nothing").dataset == {"origins": {"human": 96}}
    merge_adapters([tmp_path / "x", a], tmp_path / "half")
    assert distance(vectors(tmp_path / "half"), vectors(a, adapter_scale=0.5)) < 1e-5


def test_windows_are_kept(tiny_model, tmp_path):
    paths = [random_adapter(tiny_model, tmp_path / str(seed), seed, window=16) for seed in (0, 1)]
    merge_adapters(paths, tmp_path / "merged", weights=[1, 0])
    long = " ".join(WORDS[:40])
    merged, alone = (LoraEmbedding(path, device="cpu") for path in (tmp_path / "merged", paths[0]))
    assert distance(merged.get_text_embedding(long), alone.get_text_embedding(long)) < 1e-5
