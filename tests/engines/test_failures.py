"""What goes wrong in a run, and what is left on disk then."""

import os
import shutil

import pytest
from sentence_transformers.sentence_transformer import losses

from llama_index_lora_embed import LoraEmbedding, LoraFinetuneEngine
from llama_index_lora_embed.core.errors import (
    ModelNotFoundError,
    NonFiniteLossError,
    OutputDirectoryError,
    UnsafeCheckpointError,
)
from tests.engines.conftest import QUIET, finetune


def test_a_nan_loss_stops_the_run_and_leaves_its_log_alone(tiny_model, dataset, val_dataset, out):
    class Broken(losses.MultipleNegativesRankingLoss):
        def forward(self, features, labels):
            return super().forward(features, labels) * float("nan")

    with pytest.raises(NonFiniteLossError, match="nan at step 1"):
        finetune(dataset, tiny_model, out, val_dataset=val_dataset, loss=Broken)
    assert os.listdir(os.path.dirname(out)) == ["adapter.run"], "the log alone"
    assert sorted(os.listdir(f"{out}.run")) == ["lock", "log.jsonl"]


def test_weights_that_became_nan_are_not_written(tiny_model, dataset, val_dataset, out):
    with pytest.raises(NonFiniteLossError):
        finetune(dataset, tiny_model, out, val_dataset=val_dataset, learning_rate=1e30, max_seq_length=16, epochs=5)
    assert not os.path.exists(out)


def test_a_failed_run_leaves_the_old_adapter(tiny_model, dataset, val_dataset, adapter, tmp_path):
    out = shutil.copytree(adapter, tmp_path / "adapter")
    before = LoraEmbedding(out).fingerprint

    class Broken(losses.MultipleNegativesRankingLoss):
        def forward(self, features, labels):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        finetune(dataset, tiny_model, str(out), val_dataset=val_dataset, loss=Broken)
    assert LoraEmbedding(out).fingerprint == before
    assert sorted(os.listdir(tmp_path)) == ["adapter", "adapter.run"]


def test_a_full_disk_leaves_the_old_adapter(tiny_model, dataset, val_dataset, adapter, tmp_path, monkeypatch):
    out = shutil.copytree(adapter, tmp_path / "adapter")
    before = LoraEmbedding(out).fingerprint

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputDirectoryError, match="No space left"):
        finetune(dataset, tiny_model, str(out), val_dataset=val_dataset)
    monkeypatch.undo()
    assert LoraEmbedding(out).fingerprint == before
    assert sorted(os.listdir(tmp_path)) == ["adapter", "adapter.run"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_a_read_only_folder_is_refused_before_training(tiny_model, dataset, val_dataset):
    import tempfile

    # outside pytest's folder, which only its owner may enter; root may write anywhere, so it steps down
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        as_root = os.geteuid() == 0
        try:
            if as_root:
                os.seteuid(65534)
            with pytest.raises(OutputDirectoryError, match="not writable"):
                LoraFinetuneEngine(dataset, "some/model", f"{folder}/adapter", val_dataset=val_dataset)
        finally:
            if as_root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


def test_a_base_that_needs_unpickling_is_refused(tiny_model, dataset, val_dataset, tmp_path, out):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    os.rename(base / "model.safetensors", base / "pytorch_model.bin")
    engine = LoraFinetuneEngine(dataset, str(base), out, val_dataset=val_dataset, **QUIET)
    with pytest.raises(UnsafeCheckpointError):
        engine.finetune()
    assert not os.path.exists(os.path.dirname(out))


def test_a_missing_base_is_refused_when_the_engine_is_made(dataset, val_dataset, out):
    with pytest.raises(ModelNotFoundError, match="not there"):
        LoraFinetuneEngine(dataset, "./no-such-folder", out, val_dataset=val_dataset)


def test_get_finetuned_model_before_training_is_refused(tiny_model, dataset, val_dataset, out):
    with pytest.raises(OutputDirectoryError, match="finetune"):
        LoraFinetuneEngine(dataset, tiny_model, out, val_dataset=val_dataset).get_finetuned_model()
