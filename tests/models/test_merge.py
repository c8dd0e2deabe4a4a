"""Merging adapters: the arithmetic, the directory that is written, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config import DEFAULT_BASE
from llama_index_lora_embed.core.errors import (
    AdapterError,
    BaseModelMismatchError,
    ConfigError,
    LoraEmbedError,
    ModelNotFoundError,
    OutputDirectoryError,
    WrongIndexError,
)
from llama_index_lora_embed.deployment import merge_adapters, stamp_index, verify_index
from llama_index_lora_embed.models import adapter_directory
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.conftest import WORDS, make_engine
from tests.helpers.adapters import random_adapter, weight_changes

TEXTS = [" ".join(WORDS[i : i + 1 + i % 12]) for i in range(30)]


def vectors(*args, **kwargs):
    return np.array(LoraEmbedding(*args, **kwargs, device="cpu").get_text_embedding_batch(TEXTS))


def distance(left, right):
    return np.abs(np.asarray(left) - np.asarray(right)).max()


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


def test_the_manifest_and_the_card_name_the_parents_with_their_weights(a, b, tiny_model, tmp_path):
    merged = merge_adapters([a, b], tmp_path / "merged", weights=[0.7, 0.2], combination="ties", rank=5)
    manifest, parents = Manifest.read(tmp_path / "merged"), [Manifest.read(path) for path in (a, b)]
    assert manifest.parents == [
        {"path": str(a), "fingerprint": parents[0].fingerprint, "weight": 0.7},
        {"path": str(b), "fingerprint": parents[1].fingerprint, "weight": 0.2},
    ]
    assert manifest.settings == {"combination": "ties", "rank": 5, "kept": merged.kept, "density": 0.2, "seed": 0}
    assert manifest.base == parents[0].base
    assert manifest.dataset == {}, "it is not known what they were trained on"
    assert manifest.lora["r"] == 5
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Merged from 0.7 x a, 0.2 x b. NOT EVALUATED" in card
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in (tmp_path / "merged").rglob("*"))


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
    model = SentenceTransformer(tiny_model, device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(str(tmp_path / "plain"))
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


def test_the_adapter_that_is_replaced_stays_as_the_previous_one(a, b, tmp_path):
    path = tmp_path / "a"
    shutil.copytree(a, path)
    merged = merge_adapters([path, b], path)
    assert Manifest.read(tmp_path / "a.previous").fingerprint == Manifest.read(a).fingerprint
    assert LoraEmbedding(path, device="cpu").fingerprint == merged.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.previous"]


def test_outputs_that_would_lose_something_are_refused(a, b, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for name, why in (("file", "is a file"), ("full", "did not write"), ("file/below", "not writable")):
        with pytest.raises(OutputDirectoryError, match=why):
            merge_adapters([a, b], tmp_path / name)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_old_adapter_and_nothing_else(a, b, tmp_path, monkeypatch):
    path = shutil.copytree(a, tmp_path / "a")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_directory, "replace_directory", full)
    with pytest.raises(OutputDirectoryError, match="No space left"):
        merge_adapters([a, b], path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert Manifest.read(path).fingerprint == Manifest.read(a).fingerprint


@pytest.mark.slow
def test_a_merge_that_is_killed_while_writing_leaves_the_old_adapter(a, b, tmp_path):
    path = shutil.copytree(a, tmp_path / "a")
    code = f"""
import os, signal
from llama_index_lora_embed.deployment import merge_adapters
from llama_index_lora_embed.models import adapter_directory
adapter_directory.replace_directory = lambda staging, target: os.kill(os.getpid(), signal.SIGKILL)
for target in ({str(path)!r}, {str(tmp_path / "new")!r})[int(os.environ["TARGET"]):]:
    merge_adapters([{str(a)!r}, {str(b)!r}], target)
"""
    for target in "01":
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TARGET": target}, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["a"]
    assert LoraEmbedding(path, device="cpu").fingerprint == Manifest.read(a).fingerprint


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"weights": [0.5]}, r"weights=\[0.5\] for 2 adapter"),
        ({"weights": [0.5, float("nan")]}, "finite number"),
        ({"weights": [0.5, True]}, "finite number"),
        ({"weights": "12"}, "finite number"),
        ({"weights": 0.5}, "finite number"),
        ({"weights": [0, 0.0]}, "all of them 0"),
        ({"combination": "svd"}, "expected one of linear, ties, dare_linear, dare_ties"),
        ({"density": 0.5}, "'linear' keeps every entry"),
        ({"combination": "ties", "density": 0.0}, "above 0 and at most 1"),
        ({"combination": "ties", "density": 1.5, "rank": 0}, "rank=0"),
        ({"rank": 2.5}, "whole number"),
        ({"max_seq_length": 65}, "at most 64"),
        ({"max_seq_length": 0}, "max_seq_length=0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(a, b, tmp_path, settings, why):
    with pytest.raises(ConfigError, match=why):
        merge_adapters([a, b], tmp_path / "merged", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("adapters", [[], "runs/a", ["runs/a", 3], [""], None])
def test_adapters_that_are_no_list_of_paths_are_refused(adapters, tmp_path):
    with pytest.raises(ConfigError, match="a list of folders or Hub ids"):
        merge_adapters(adapters, tmp_path / "merged")


def test_adapters_of_different_bases_are_refused_by_name(a, other_tiny_model, tmp_path):
    foreign = random_adapter(other_tiny_model, tmp_path / "foreign", 0)
    with pytest.raises(BaseModelMismatchError, match="different base models") as caught:
        merge_adapters([a, foreign], tmp_path / "merged")
    assert [str(foreign) in problem for problem in caught.value.problems] == [False, True]
    assert other_tiny_model in caught.value.problems[1]
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"query_prompt": "query : "}, "query prompt: '' in .*'query : ' in "),
        ({"pooling": "cls"}, "Pooling.pooling_mode: 'mean' in .*'cls' in "),
        ({"window": 16}, "JoinWindows.window: None in .*16 in "),
        ({"max_seq_length": 32}, "max_seq_length: 16 in .*32 in "),
    ],
)
def test_adapters_that_embed_a_text_differently_are_refused_with_the_difference(a, tiny_model, tmp_path, settings, why):
    other = random_adapter(tiny_model, tmp_path / "other", 3, **settings)
    with pytest.raises(ConfigError, match=why):
        merge_adapters([a, other], tmp_path / "merged")


def test_a_length_can_be_named_where_adapters_differ(a, tiny_model, tmp_path):
    longer = random_adapter(tiny_model, tmp_path / "longer", 3, max_seq_length=32)
    with pytest.raises(ConfigError, match="Pass max_seq_length="):
        merge_adapters([a, longer], tmp_path / "merged")
    merge_adapters([a, longer], tmp_path / "merged", max_seq_length=32)
    merged = LoraEmbedding(tmp_path / "merged", device="cpu")
    assert merged.max_seq_length == merged.manifest.max_seq_length == 32


def test_windows_are_kept(tiny_model, tmp_path):
    paths = [random_adapter(tiny_model, tmp_path / str(seed), seed, window=16) for seed in (0, 1)]
    merge_adapters(paths, tmp_path / "merged", weights=[1, 0])
    long = " ".join(WORDS[:40])
    merged, alone = (LoraEmbedding(path, device="cpu") for path in (tmp_path / "merged", paths[0]))
    assert distance(merged.get_text_embedding(long), alone.get_text_embedding(long)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["pooler"]}, "modules_to"),
    ],
)
def test_adapters_that_are_more_than_plain_lora_are_refused(a, tiny_model, tmp_path, settings, why):
    other = random_adapter(tiny_model, tmp_path / "other", 3, **settings)
    with pytest.raises(ConfigError, match=f"other: {why}"):
        merge_adapters([a, other], tmp_path / "merged")


@pytest.mark.parametrize("damage", ["missing", "shape", "unknown module", "nan", "embedding"])
def test_weights_that_do_not_fit_are_refused(a, b, tmp_path, damage):
    path = shutil.copytree(b, tmp_path / "b")
    (path / "finetune.json").unlink()  # otherwise the digest tells
    weights = load_file(path / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("value.lora_A.weight"))
    if damage == "missing":
        del weights[name]
    elif damage == "shape":
        weights[name] = weights[name][:, :5].contiguous()
    elif damage == "unknown module":
        weights = {key.replace("layer.1", "layer.7"): tensor for key, tensor in weights.items()}
    elif damage == "nan":
        weights[name][0, 0] = float("nan")
    else:
        weights["base_model.model.embeddings.word_embeddings.lora_embedding_A"] = torch.zeros(2, 5)
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="do not fit"):
        merge_adapters([a, path], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_missing_and_damaged_adapters_are_refused(a, b, tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        merge_adapters([a, "./nowhere"], tmp_path / "merged")
    path = shutil.copytree(b, tmp_path / "b")
    (path / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(LoraEmbedError, match="cut short"):
        merge_adapters([a, path], tmp_path / "merged")


def test_a_base_that_moved_can_be_named(a, b, tiny_model, tmp_path):
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    merged = merge_adapters([a, b], tmp_path / "merged", base_model=str(moved))
    assert Manifest.read(tmp_path / "merged").base["model_id"] == str(moved)
    assert merged.fingerprint == merge_adapters([a, b], tmp_path / "again").fingerprint
