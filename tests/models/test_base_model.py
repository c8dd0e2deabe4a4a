import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.core.errors import (
    ConfigError,
    ModelNotFoundError,
    UnsafeCheckpointError,
)
from llama_index_lora_embed.models.base_model import describe_base


def test_a_pickled_base_is_refused(tmp_path, tiny_model):
    pickled = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError, match=r"pytorch_model\.bin"):
        describe_base(str(pickled))


def test_an_adapter_is_refused_as_a_base_model(adapter):
    with pytest.raises(ConfigError, match="is an adapter"):
        describe_base(str(adapter))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_a_missing_model_is_refused(path):
    with pytest.raises(ModelNotFoundError, match="not there"):
        describe_base(path)


def test_a_hub_model_out_of_reach_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match="Hub"):
        describe_base("nobody/no-such-model", cache_folder=str(tmp_path))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_on_hub(folder, cache, name):
    """Lay a folder into huggingface_hub's cache, as a download would."""
    repository = cache / f"models--somebody--{name}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_a_hub_model_is_found_in_the_cache_with_its_revision(tmp_path, tiny_model):
    put_on_hub(tiny_model, tmp_path, "tiny")
    base = describe_base("somebody/tiny", cache_folder=str(tmp_path))
    assert (base.model_id, base.revision) == ("somebody/tiny", COMMIT)
    assert base.weights_sha256 == describe_base(tiny_model).weights_sha256


def test_a_relative_cache_folder_is_found_from_another_working_directory(tmp_path, tiny_model, monkeypatch):
    put_on_hub(tiny_model, tmp_path / "cache", "tiny")
    monkeypatch.chdir(tmp_path)
    model = LoraEmbedding(base_model="somebody/tiny", cache_folder=Path("cache"), device="cpu")
    pickled = pickle.dumps(model)
    monkeypatch.chdir("/")
    assert pickle.loads(pickled).get_text_embedding("w1") == model.get_text_embedding("w1")


def test_adapter_and_base_load_by_their_hub_ids(tmp_path, tiny_model, dataset, val_dataset):
    put_on_hub(tiny_model, tmp_path / "cache", "tiny")
    engine = LoraFinetuneEngine(
        dataset, "somebody/tiny", str(tmp_path / "out"), val_dataset=val_dataset, learning_rate=5e-3, epochs=6,
        batch_size=8, cache_folder=str(tmp_path / "cache"), device="cpu", show_progress_bar=False,
    )  # fmt: skip
    engine.finetune()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/tiny", COMMIT)
    put_on_hub(tmp_path / "out", tmp_path / "cache", "tuned")
    tuned = LoraEmbedding("somebody/tuned", cache_folder=str(tmp_path / "cache"), device="cpu")
    assert tuned.get_text_embedding("w1") == engine.get_finetuned_model().get_text_embedding("w1")
    assert tuned.fingerprint == engine.get_finetuned_model().fingerprint
