import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer import losses
from transformers import TrainerCallback

from llama_index_lora_embed import LoraFinetuneEngine
from llama_index_lora_embed.errors import ConfigError
from llama_index_lora_embed.training.trainer import LoraTrainer, latest_checkpoint
from tests.conftest import make_dataset


def engine(model, path, **kwargs):
    settings = {
        "batch_size": 8,
        "epochs": 4,
        "learning_rate": 5e-3,
        "val_dataset": make_dataset(passages=10, seed=7, prefix="v"),
        "show_progress_bar": False,
        "device": "cpu",
        "save_checkpoints": True,
        "checkpoint_save_steps": 5,
    }
    return LoraFinetuneEngine(make_dataset(), model, str(path), **{**settings, **kwargs})


class PullThePlug(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(tiny_model, tmp_path, monkeypatch):
    """A run of twelve steps that was stopped at the seventh, with a checkpoint of the fifth."""
    init = LoraTrainer.__init__

    def with_plug(self, **kwargs):
        init(self, **kwargs)
        self.add_callback(PullThePlug())

    monkeypatch.setattr(LoraTrainer, "__init__", with_plug)
    with pytest.raises(KeyboardInterrupt):
        engine(tiny_model, tmp_path / "run").finetune()
    monkeypatch.undo()
    return tmp_path / "run"


def weights(path):
    return load_file(Path(path) / "adapter_model.safetensors")


def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_model, interrupted, tmp_path):
    whole = engine(tiny_model, tmp_path / "whole").finetune()
    resumed = engine(tiny_model, interrupted, resume_from_checkpoint=True).finetune()
    assert resumed.steps == whole.steps == 12
    assert [e["step"] for e in resumed.history] == [e["step"] for e in whole.history] == [0, 3, 6, 9, 12]
    assert resumed.tuned_metrics == whole.tuned_metrics
    assert resumed.base_metrics == whole.base_metrics
    assert resumed.comparison == whole.comparison
    ours, theirs = weights(interrupted), weights(tmp_path / "whole")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("resumes", [1, 2])
def test_a_checkpoint_of_an_epochs_last_step_is_evaluated_after_the_resume(tiny_model, tmp_path, resumes):
    whole = engine(tiny_model, tmp_path / "run", evaluation_steps=0, checkpoint_save_steps=12).finetune()
    checkpoint = tmp_path / "run.checkpoints" / "checkpoint-12"
    state = json.loads((checkpoint / "evaluations.json").read_text())
    assert [entry["step"] for entry in state["history"]] == [0, 3, 6, 9], "written before the epoch was evaluated"
    for _ in range(resumes):
        again = engine(
            tiny_model, tmp_path / "run", evaluation_steps=0, checkpoint_save_steps=12, resume_from_checkpoint=True
        ).finetune()
    assert again.history == whole.history
    assert again.fingerprint == whole.fingerprint


def test_a_run_can_be_resumed_in_the_same_process_with_the_same_lora_config(tiny_model, interrupted):
    config = LoraConfig(r=4)
    first = engine(tiny_model, interrupted.with_name("own"), lora_config=config, checkpoint_save_steps=3)
    first.finetune()
    assert config.target_modules is None
    assert config.base_model_name_or_path is None
    assert (
        engine(tiny_model, interrupted.with_name("own"), lora_config=config, resume_from_checkpoint=True)
        .finetune()
        .steps
        == 12
    )


def test_a_resume_with_another_loss_is_refused(tiny_model, interrupted):
    with pytest.raises(ConfigError) as caught:
        engine(
            tiny_model, interrupted, resume_from_checkpoint=True, loss=losses.MultipleNegativesRankingLoss
        ).finetune()
    assert caught.value.problems == ["loss: None then, 'MultipleNegativesRankingLoss' now"]


def test_an_interrupted_run_leaves_checkpoints_and_no_adapter(interrupted):
    assert not interrupted.exists()
    assert [path.name for path in interrupted.with_name("run.checkpoints").glob("*[!n]")] == ["checkpoint-5"]


def test_checkpoints_hold_nothing_that_would_need_unpickling_of_code(interrupted):
    import torch

    checkpoint = interrupted.with_name("run.checkpoints") / "checkpoint-5"
    assert not (checkpoint / "training_args.bin").exists()
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)  # raises if anything but plain data is inside
    assert (checkpoint / "adapter_model.safetensors").exists()


def test_a_resume_with_other_settings_is_refused_with_the_difference(tiny_model, interrupted):
    with pytest.raises(ConfigError) as caught:
        engine(tiny_model, interrupted, resume_from_checkpoint=True, seed=1).finetune()
    assert caught.value.problems == ["seed: 42 then, 1 now"]


def test_a_fresh_run_puts_old_checkpoints_aside(tiny_model, interrupted):
    with pytest.warns(UserWarning, match="gained nothing"):
        engine(tiny_model, interrupted, epochs=1, checkpoint_save_steps=2, learning_rate=1e-9).finetune()
    folders = sorted(os.listdir(interrupted.parent))
    aside = [name for name in folders if name.startswith("run.checkpoints.")]
    assert len(aside) == 1
    assert (interrupted.parent / aside[0] / "checkpoint-5").exists()
    assert not (interrupted.with_name("run.checkpoints") / "checkpoint-5").exists()


def test_resume_without_a_checkpoint_starts_afresh(tiny_model, tmp_path):
    assert engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune().steps == 12


def test_only_the_newest_checkpoints_are_kept(tiny_model, tmp_path):
    engine(tiny_model, tmp_path / "run", checkpoint_save_steps=2, checkpoint_save_total_limit=2).finetune()
    kept = sorted(path.name for path in (tmp_path / "run.checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-12"]


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "evaluations.json", "trainer_state.json"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(interrupted, name, caplog):
    run = interrupted.with_name("run.checkpoints")
    shutil.copytree(run / "checkpoint-5", run / "checkpoint-6")
    path = run / "checkpoint-6" / name
    path.write_bytes(path.read_bytes()[:50])
    assert latest_checkpoint(run) == str(run / "checkpoint-5")
    assert "checkpoint-6 is damaged" in caplog.text


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_checkpoint_that_would_run_code_is_not_loaded(interrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = interrupted.with_name("run.checkpoints")
    with open(run / "checkpoint-5" / "optimizer.pt", "wb") as file:
        pickle.dump(Evil(), file)
    assert latest_checkpoint(run) is None
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_that_is_not_whole_is_no_checkpoint(interrupted):
    run = interrupted.with_name("run.checkpoints")
    assert latest_checkpoint(run) == str(run / "checkpoint-5")
    (run / "checkpoint-5" / "adapter_model.safetensors").unlink()
    assert latest_checkpoint(run) is None
    shutil.rmtree(run)
    assert latest_checkpoint(run) is None


def test_the_best_weights_survive_a_resume(interrupted):
    checkpoint = interrupted.with_name("run.checkpoints") / "checkpoint-5"
    state = json.loads((checkpoint / "evaluations.json").read_text())
    assert [entry["step"] for entry in state["history"]] == [0, 3]
    assert load_file(checkpoint / "best_adapter.safetensors").keys()
