import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.core.errors import (
    AdapterError,
    BaseModelMismatchError,
    LoraEmbedError,
    ModelNotFoundError,
    OutputDirectoryError,
    UnsafeCheckpointError,
)
from llama_index_lora_embed.core.files import file_digest, staging_beside
from llama_index_lora_embed.models.adapter_directory import Manifest, check_output, describe_modules, tokenizer_digest
from llama_index_lora_embed.models.base_model import describe_base
from tests.conftest import WORDS, make_engine
from tests.helpers.adapters import TEXTS, distance, plain_adapter, random_adapter


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def load(path, **kwargs):
    return LoraEmbedding(path, device="cpu", **kwargs)


def without_manifest(path: Path) -> Path:
    (path / "finetune.json").unlink()
    return path


def test_the_directory_contains_the_files_of_sentence_transformers_and_peft(adapter):
    names = {path.name for path in adapter.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "modules.json", "finetune.json", "README.md"}
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in adapter.rglob("*"))
    assert all(path.stat().st_mode & 0o044 for path in adapter.rglob("*")), "readable by other users"


def test_nothing_but_the_directory_is_left_behind(adapter):
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter", "adapter.run"]


def test_the_manifest_says_how_the_adapter_was_made(adapter, tiny_model):
    manifest = Manifest.read(adapter)
    base = describe_base(tiny_model)
    assert manifest.base == {"model_id": tiny_model, "revision": None, "weights_sha256": base.weights_sha256}
    assert manifest.prompts == {"query": "", "document": ""}
    assert [module["type"] for module in manifest.pooling] == ["Pooling", "Normalize"]
    assert manifest.normalise is True
    assert manifest.similarity == "cosine"
    assert manifest.max_seq_length == 16
    assert manifest.dataset["queries"] == 48
    assert manifest.dataset["origins"] == {"human": 48}
    assert manifest.settings["batch_size"] == 8
    assert manifest.metrics["tuned"]["ndcg@10"] > manifest.metrics["base"]["ndcg@10"]
    assert manifest.best_step > 0
    assert manifest.verdict
    assert {"peft", "torch", "sentence-transformers", "transformers"} <= manifest.versions.keys()
    assert len(manifest.fingerprint) == 64
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model


@pytest.mark.parametrize("cut", ["half", "flip", "empty"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_damaged_adapter_file_is_refused(copy, cut, with_manifest):
    if not with_manifest:
        without_manifest(copy)
    path = copy / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    if cut == "half":
        content = content[: len(content) // 2]
    elif cut == "flip":
        content[3 if not with_manifest else -100] ^= 0xFF  # without a digest only the header tells
    else:
        content = b""
    path.write_bytes(bytes(content))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        load(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "adapter_config.json", "1_Pooling/config.json", "modules.json"])
def test_a_changed_or_missing_file_is_refused(copy, name):
    path = copy / name
    path.write_text(path.read_text() + " ")
    with pytest.raises(AdapterError, match="changed or cut short"):
        load(copy)
    path.unlink()
    with pytest.raises(AdapterError):
        load(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 99}'])
def test_a_damaged_manifest_is_refused(copy, content):
    (copy / "finetune.json").write_text(content)
    with pytest.raises(AdapterError, match=r"finetune\.json"):
        load(copy)


def test_the_readme_may_be_edited(copy):
    (copy / "README.md").write_text("mine")
    assert len(load(copy).get_text_embedding("w1")) == 32


@pytest.mark.parametrize("change", ["missing", "left over", "wrong shape"])
def test_adapter_keys_that_do_not_fit_are_refused(copy, change):
    path = without_manifest(copy) / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    if change == "missing":
        del weights[name]
    elif change == "left over":
        weights[name.replace("layer.0", "layer.7")] = torch.ones(2, 2)
    else:
        weights[name] = torch.ones(3, 5)
    save_file(weights, path)
    with pytest.raises(AdapterError) as caught:
        load(copy)
    if change != "wrong shape":
        assert change in str(caught.value)


def test_an_adapter_that_changes_nothing_is_refused(copy):
    path = without_manifest(copy) / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match="changes nothing"):
        load(copy)


def test_another_base_than_the_one_trained_on_is_refused(copy, other_tiny_model):
    with pytest.raises(BaseModelMismatchError) as caught:
        load(copy, base_model=other_tiny_model)
    assert describe_base(other_tiny_model).weights_sha256[:12] in str(caught.value)


def test_a_base_whose_weights_changed_in_place_is_refused(tmp_path, copy, tiny_model):
    moved = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(moved / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelMismatchError):
        load(copy, base_model=str(moved))


def test_a_base_that_moved_can_be_named(tmp_path, copy, tiny_model, adapter):
    moved = shutil.move(shutil.copytree(tiny_model, tmp_path / "a"), tmp_path / "b")
    embed_model = load(copy, base_model=str(moved))
    assert embed_model.get_text_embedding("w1 w2") == load(adapter).get_text_embedding("w1 w2")
    assert embed_model.fingerprint == load(adapter).fingerprint


def test_the_error_for_a_missing_base_model_names_the_argument(copy):
    config = json.loads((without_manifest(copy) / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere/at/all"}))
    with pytest.raises(ModelNotFoundError, match="base_model="):
        load(copy)


def test_pickled_adapter_weights_are_refused(copy):
    weights = load_file(without_manifest(copy) / "adapter_model.safetensors")
    (copy / "adapter_model.safetensors").unlink()
    torch.save(weights, copy / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpointError, match=r"adapter_model\.bin"):
        load(copy)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match="without model weights"):
        describe_base(str(tmp_path))
    with pytest.raises(AdapterError, match="no adapter_config"):
        load(tmp_path)


def test_output_paths_with_other_files_are_refused(tmp_path, adapter, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for name, why in (("file", "is a file"), ("full", "did not write"), ("file/below", "not writable")):
        with pytest.raises(OutputDirectoryError, match=why):
            check_output(tmp_path / name)
    shutil.copytree(adapter, tmp_path / "mine")
    (tmp_path / "mine.previous").mkdir()
    (tmp_path / "mine.previous" / "notes.txt").write_text("mine")
    with pytest.raises(OutputDirectoryError, match="is not an adapter"):
        check_output(tmp_path / "mine")
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as patch:  # tests have no permission to mount
        patch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
        with pytest.raises(OutputDirectoryError, match="mount point"):
            check_output(tmp_path / "disk")
    (tmp_path / "disk").rmdir()
    shutil.rmtree(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine.previous")
    (tmp_path / "empty").mkdir()
    assert check_output(tmp_path / "empty") == tmp_path / "empty"
    assert check_output(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert check_output(adapter) == adapter
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"], "looking leaves no trace"


def test_a_read_only_adapter_loads(copy, adapter):
    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert load(copy).fingerprint == load(adapter).fingerprint


@pytest.mark.slow
def test_a_run_killed_while_writing_leaves_the_old_adapter(adapter, tmp_path, tiny_model):
    out = shutil.copytree(adapter, tmp_path / "adapter")
    code = f"""
import os, signal
from llama_index_lora_embed import LoraFinetuneEngine
from llama_index_lora_embed.models import adapter_directory
from llama_index_lora_embed.training.checkpointing import checkpoints  # keeps the function that is replaced below
from tests.conftest import make_dataset
engine = LoraFinetuneEngine(
    make_dataset(), {tiny_model!r}, {str(out)!r}, epochs=1, val_fraction=0, device="cpu", show_progress_bar=False
)
adapter_directory.replace_directory = lambda staging, target: os.kill(os.getpid(), signal.SIGKILL)
engine.finetune()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load(out).fingerprint == load(adapter).fingerprint
    (left,) = [path for path in tmp_path.iterdir() if path.name not in (out.name, f"{out.name}.run")]
    with staging_beside(out):
        assert left.exists(), "a recent one may be another process's"
    os.utime(left, (0, 0))
    with staging_beside(out):
        assert not left.exists()


def test_a_plain_sentence_transformers_adapter_loads(tmp_path, tiny_model):
    model = plain_adapter(tiny_model, tmp_path / "plain", use_dora=True)
    embed_model = load(tmp_path / "plain")
    assert distance(embed_model.get_text_embedding_batch(TEXTS), model.encode(TEXTS)) < 1e-5
    assert embed_model.manifest is None
    assert len(embed_model.fingerprint) == 64


def test_every_error_is_a_lora_embed_error_and_says_what_to_do():
    import llama_index_lora_embed.core.errors as errors

    for name in errors.__all__:
        error_class = getattr(errors, name)
        assert issubclass(error_class, LoraEmbedError)
        error = error_class("this", "that", "Do so.")
        assert str(error).startswith("got this; expected that. Do so.")


def trained_on(model, path):
    """Four steps of sentence-transformers' trainer, saved."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    texts = {
        side: [" ".join(WORDS[i + shift : i + shift + 4]) for i in range(16)] for side, shift in (("a", 0), ("p", 2))
    }
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(path), use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, arguments, Dataset.from_dict(texts), loss=loss).train()
    model.save_pretrained(str(path), create_model_card=False)
    return path


@pytest.mark.slow
def test_sentence_transformers_trainer_trains_a_loaded_directory_as_one_of_its_own(adapter, tiny_model, tmp_path):
    from peft import LoraConfig

    model = SentenceTransformer(tiny_model, device="cpu")
    model.add_adapter(LoraConfig(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    theirs = trained_on(model, tmp_path / "theirs")
    text = " ".join(WORDS[:5])
    for number, path in enumerate((adapter, theirs)):
        model = SentenceTransformer(str(path), device="cpu")
        with pytest.raises(RuntimeError, match="does not require grad"):  # both are loaded frozen
            trained_on(model, tmp_path / "frozen")
        before = model.encode(text)
        model.set_adapter("default")
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
        more = trained_on(model, tmp_path / f"more{number}")
        assert np.abs(model.encode(text) - before).max() > 1e-3
        assert np.abs(SentenceTransformer(str(more), device="cpu").encode(text) - model.encode(text)).max() < 1e-6
        assert np.abs(np.array(load(more).get_text_embedding(text)) - model.encode(text)).max() < 1e-6
    assert 'set_adapter("default")' in (adapter / "README.md").read_text()


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "all"}])
def test_pefts_auto_class_loads_the_directory(tiny_model, tmp_path, more):
    from peft import AutoPeftModelForFeatureExtraction, PeftModelForFeatureExtraction

    path = random_adapter(tiny_model, tmp_path / "run", 3, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        model = AutoPeftModelForFeatureExtraction.from_pretrained(str(path)).eval()
    assert isinstance(model, PeftModelForFeatureExtraction)
    plain = SentenceTransformer(str(path), device="cpu")
    features = plain.preprocess([" ".join(WORDS[:5]), "w7"])
    inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        tokens = model(**inputs).last_hidden_state
        expected = plain[0](dict(features))["token_embeddings"]
    assert torch.allclose(tokens, expected, atol=1e-6)


def test_a_directory_without_a_task_type_keeps_its_fingerprint_and_gets_one_when_it_is_continued(
    adapter, tmp_path, tiny_model
):
    old = shutil.copytree(adapter, tmp_path / "old")
    config = json.loads((old / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"
    (old / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}, indent=2, sort_keys=True) + "\n")
    (old / "finetune.json").unlink()
    settings = {**config, "task_type": None}
    for ignored in ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"):
        del settings[ignored]
    model = SentenceTransformer(str(adapter), device="cpu")
    determining = {
        "base": describe_base(tiny_model).weights_sha256,
        "adapter": {**settings, "weights": file_digest(old / "adapter_model.safetensors")},
        "prompts": {"query": "", "document": ""},
        "modules": describe_modules(model),
        "max_seq_length": model.max_seq_length,
        "tokenizer": tokenizer_digest(model.tokenizer),
        "precision": "float32",
    }
    digest = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()
    assert load(old).fingerprint == digest != load(adapter).fingerprint
    assert load(old).get_text_embedding("w1 w2") == load(adapter).get_text_embedding("w1 w2")
    make_engine(tiny_model, tmp_path / "new", continue_from=str(old), epochs=1).finetune()
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
