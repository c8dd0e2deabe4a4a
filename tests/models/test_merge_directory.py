"""Merging adapters: the directory that is written, and what is refused."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import (
    AdapterError,
    BaseModelMismatchError,
    ConfigError,
    LoraEmbedError,
    ModelNotFoundError,
    OutputDirectoryError,
)
from llama_index_lora_embed.deployment import merge_adapters
from llama_index_lora_embed.models import adapter_directory
from llama_index_lora_embed.models.adapter_directory import Manifest
from tests.helpers.adapters import random_adapter


@pytest.fixture(scope="module")
def a(tiny_model, tmp_path_factory):
    return random_adapter(tiny_model, tmp_path_factory.mktemp("a") / "a", 0)


@pytest.fixture(scope="module")
def b(tiny_model, tmp_path_factory):
    return random_adapter(tiny_model, tmp_path_factory.mktemp("b") / "b", 1)


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


def test_the_adapter_that_is_replaced_stays_as_the_previous_one(a, b, tmp_path):
    path = tmp_path / "a"
    shutil.copytree(a, path)
    merged = merge_adapters([path, b], path)
    assert Manifest.read(tmp_path / "a.previous").fingerprint == Manifest.read(a).fingerprint
    assert LoraEmbedding(path, device="cpu").fingerprint == merged.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.previous"]


def test_an_output_folder_with_other_files_is_refused(a, b, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputDirectoryError, match="did not write"):
        merge_adapters([a, b], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


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
