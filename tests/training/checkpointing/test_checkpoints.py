import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer import losses
from transformers import TrainerCallback

from llama_index_lora_embed.core.errors import AdapterError, ConfigError, NonFiniteLossError, OutputDirectoryError
from llama_index_lora_embed.core.files import file_digest
from llama_index_lora_embed.models import adapter_directory
from llama_index_lora_embed.training.checkpointing import checkpoints
from llama_index_lora_embed.training.checkpointing.checkpoints import latest_checkpoint, read_record
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.conftest import make_dataset
from tests.helpers.training import checkpointing_engine as engine
from tests.helpers.training import stop_at, weights


class PullThePlug(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted_once(tiny_model, tmp_path_factory):
    """The folder of a run of twelve steps that was stopped at the seventh, with a checkpoint of the fifth."""
    folder = tmp_path_factory.mktemp("interrupted")
    init = LoraTrainer.__init__

    def with_plug(self, **kwargs):
        init(self, **kwargs)
        self.add_callback(PullThePlug())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraTrainer, "__init__", with_plug)
        with pytest.raises(KeyboardInterrupt):
            engine(tiny_model, folder / "run").finetune()
    return folder


@pytest.fixture
def interrupted(interrupted_once, tmp_path):
    """A copy of the interrupted run that a test may change."""
    shutil.copytree(interrupted_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


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
    checkpoint = tmp_path / "run.run" / "checkpoint-12"
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
    assert sorted(os.listdir(interrupted.with_name("run.run"))) == ["checkpoint-5", "lock", "log.jsonl"]


def test_checkpoints_hold_nothing_that_would_need_unpickling_of_code(interrupted):
    import torch

    checkpoint = interrupted.with_name("run.run") / "checkpoint-5"
    assert not (checkpoint / "training_args.bin").exists()
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)  # raises if anything but plain data is inside
    assert (checkpoint / "adapter_model.safetensors").exists()


def test_a_resume_with_other_settings_is_refused_with_the_difference(tiny_model, interrupted):
    with pytest.raises(ConfigError) as caught:
        engine(tiny_model, interrupted, resume_from_checkpoint=True, seed=1).finetune()
    assert caught.value.problems == ["seed: 42 then, 1 now"]


def test_a_fresh_run_moves_old_checkpoints_aside(tiny_model, interrupted):
    with pytest.warns(UserWarning, match="gained nothing"):
        engine(tiny_model, interrupted, epochs=1, checkpoint_save_steps=2, learning_rate=1e-9).finetune()
    folders = sorted(os.listdir(interrupted.parent))
    aside = [name for name in folders if name.startswith("run.run.")]
    assert len(aside) == 1
    assert (interrupted.parent / aside[0] / "checkpoint-5").exists()
    assert not (interrupted.with_name("run.run") / "checkpoint-5").exists()


def test_resuming_without_a_checkpoint_starts_at_step_0(tiny_model, tmp_path):
    assert engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune().steps == 12


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [12]), (2, [10, 12]), (5, [4, 6, 8, 10, 12]), (9, [2, 4, 6, 8, 10, 12])]
)
def test_only_the_newest_checkpoints_are_kept(tiny_model, tmp_path, limit, kept):
    engine(tiny_model, tmp_path / "run", checkpoint_save_steps=2, checkpoint_save_total_limit=limit).finetune()
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run.run")] == [f"checkpoint-{step}" for step in kept]


def test_a_damaged_checkpoint_does_not_replace_an_undamaged_one(interrupted):
    run = interrupted.with_name("run.run")
    shutil.copytree(run / "checkpoint-5", run / "checkpoint-6")
    (run / "checkpoint-6" / "optimizer.pt").unlink()

    def write(folder):
        shutil.copytree(run / "checkpoint-5", folder, dirs_exist_ok=True)
        (folder / "checkpoint.json").unlink()

    checkpoints.write_checkpoint(run / "checkpoint-7", write, {}, limit=2)
    assert [p.name for p in checkpoints.checkpoints(run)] == ["checkpoint-5", "checkpoint-7"]


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "evaluations.json", "checkpoint.json"],
)
@pytest.mark.parametrize("damage", ["cut", "missing", "flipped"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(interrupted, name, damage):
    run = interrupted.with_name("run.run")
    shutil.copytree(run / "checkpoint-5", run / "checkpoint-6")
    path = run / "checkpoint-6" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-50])
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint-6' is damaged and skipped"):
        assert latest_checkpoint(run) == run / "checkpoint-5"


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_checkpoint_that_would_run_code_is_not_loaded(interrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = interrupted.with_name("run.run")
    path = run / "checkpoint-5" / "optimizer.pt"
    with open(path, "wb") as file:
        pickle.dump(Evil(), file)
    record = json.loads((run / "checkpoint-5" / "checkpoint.json").read_text())
    record["files"]["optimizer.pt"] = file_digest(path)  # whoever puts it there can do that, too
    record["digest"] = checkpoints._digest(record)
    (run / "checkpoint-5" / "checkpoint.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="UnpicklingError"):
        assert latest_checkpoint(run) is None
    assert not (tmp_path / "pwned").exists()


def test_an_incomplete_checkpoint_is_not_used(interrupted):
    run = interrupted.with_name("run.run")
    assert latest_checkpoint(run) == run / "checkpoint-5"
    (run / "checkpoint-5" / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match="adapter_model.safetensors is missing"):
        assert latest_checkpoint(run) is None
    shutil.rmtree(run)
    assert latest_checkpoint(run) is None


def test_a_checkpoint_of_an_earlier_format_is_refused_and_not_resumed_wrongly(tiny_model, interrupted):
    path = interrupted.with_name("run.run") / "checkpoint-5" / "checkpoint.json"
    record = json.loads(path.read_text())
    del record["format"]
    record["digest"] = checkpoints._digest(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"of format 1.*Resume with the version that wrote it"):
        engine(tiny_model, interrupted, resume_from_checkpoint=True).finetune()
    assert path.exists()


def test_the_best_weights_survive_a_resume(interrupted):
    checkpoint = interrupted.with_name("run.run") / "checkpoint-5"
    state = json.loads((checkpoint / "evaluations.json").read_text())
    assert [entry["step"] for entry in state["history"]] == [0, 3]
    assert load_file(checkpoint / "best_adapter.safetensors").keys()


def test_every_checkpoint_records_its_run(interrupted):
    record = read_record(interrupted.with_name("run.run") / "checkpoint-5")
    assert record["step"] == 5
    assert record["run"]["seed"] == 42
    assert record["run"]["dataset"] == make_dataset().order_digest()
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "evaluations.json",
            "best_adapter.safetensors", "trainer_state.json"} <= record["files"].keys()  # fmt: skip


def test_an_old_checkpoint_stays_until_the_new_one_is_verified(tiny_model, tmp_path, monkeypatch):
    def fails(staging, target):
        replace_directory(staging, target)
        (target / "optimizer.pt").write_bytes(b"not what was written")

    replace_directory = checkpoints.replace_directory
    monkeypatch.setattr(checkpoints, "replace_directory", fails)
    with pytest.warns(UserWarning, match=r"step 8 .*does not read back: optimizer.pt is changed or cut short"):
        engine(tiny_model, tmp_path / "run", checkpoint_save_steps=4, checkpoint_save_total_limit=1).finetune()
    monkeypatch.undo()
    kept = [p.name for p in checkpoints.checkpoints(tmp_path / "run.run")]
    assert kept == ["checkpoint-4", "checkpoint-8", "checkpoint-12"], "none of them made room for a broken one"


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 1e-3), ("epochs", 6), ("weight_decay", 0.1), ("dataset", None)]
)
def test_what_may_change_is_allowed_field_by_field_and_takes_effect(tiny_model, interrupted, name, value, monkeypatch):
    rates = []
    step = LoraTrainer.training_step

    def watched(self, *args, **kwargs):
        group = self.optimizer.param_groups[0]
        rates.append((self.state.global_step, group["lr"], group["weight_decay"]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", watched)
    changed = {"train_kwargs": value} if name == "weight_decay" else {name: value}
    more = {"weight_decay": 0.1} if name == "weight_decay" else {}
    if name == "weight_decay":
        name, changed = "train_kwargs", {}
    data = make_dataset(passages=30) if name == "dataset" else make_dataset()
    changed.pop("dataset", None)

    def again(**kwargs):
        return engine(tiny_model, interrupted, dataset=data, resume_from_checkpoint=True, **changed, **kwargs)

    with pytest.raises(ConfigError, match=f"allow_changes=.'{name}'") as caught:
        again().finetune(**more)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(name)
    result = again(allow_changes=[name]).finetune(**more)
    assert rates[0][0] == 5, "it goes on where the checkpoint was"
    assert result.steps == {"epochs": 18, "dataset": 16}.get(name, 12)
    if name == "learning_rate":
        assert rates[0][1] == pytest.approx(1e-3 * (12 - 5) / 11), "the new rate, at the old place of the schedule"
    if name == "train_kwargs":
        assert {decay for _, _, decay in rates} == {0.1}


def test_with_another_validation_set_the_base_is_evaluated_again(tiny_model, interrupted):
    other = make_dataset(passages=12, seed=9, prefix="o")
    again = engine(
        tiny_model, interrupted, val_dataset=other, resume_from_checkpoint=True, allow_changes=["val_dataset"]
    ).finetune()
    assert [entry["step"] for entry in again.history] == [0, 6, 9, 12]
    assert again.comparison.queries == len(other.queries)


def test_an_unknown_name_in_allow_changes_is_refused(tiny_model, interrupted):
    with pytest.raises(ConfigError, match=r"'lerning_rate'.*learning_rate"):
        engine(tiny_model, interrupted, resume_from_checkpoint=True, allow_changes=["lerning_rate"]).finetune()
    with pytest.raises(ConfigError, match="allow_changes='epochs'"):
        engine(tiny_model, interrupted, allow_changes="epochs")


def test_a_loss_with_weights_of_its_own_resumes_with_them(tiny_model, tmp_path, monkeypatch):
    class Scaled(losses.MultipleNegativesRankingLoss):
        def __init__(self, model):
            super().__init__(model)
            self.log_scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, *args):
            return super().forward(*args) * self.log_scale.exp()

    calm = engine(tiny_model, tmp_path / "calm", loss=Scaled).finetune()
    stop_at(monkeypatch, 7, engine(tiny_model, tmp_path / "run", loss=Scaled).finetune)
    stored = load_file(tmp_path / "run.run" / "checkpoint-7" / "loss.safetensors")
    assert float(stored["log_scale"]) != 0
    resumed = engine(tiny_model, tmp_path / "run", loss=Scaled, resume_from_checkpoint=True).finetune()
    assert resumed.fingerprint == calm.fingerprint


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tiny_model, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    write = LoraTrainer._save_checkpoint

    def on_a_full_disk(self, *args):
        full = self.state.global_step == 8
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the optimiser's file is larger
        try:
            write(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        if full:
            assert [p.name for p in checkpoints.checkpoints(tmp_path / "run.run")] == ["checkpoint-4"]
            assert checkpoints.find_damage(tmp_path / "run.run" / "checkpoint-4") is None

    monkeypatch.setattr(LoraTrainer, "_save_checkpoint", on_a_full_disk)
    with pytest.warns(UserWarning, match=r"step 8 could not be written.*Training goes on: free some space"):
        full = engine(tiny_model, tmp_path / "run", checkpoint_save_steps=4, checkpoint_save_total_limit=1).finetune()
    monkeypatch.undo()
    assert not [p for p in (tmp_path / "run.run").iterdir() if "staging" in p.name], "nothing half-written stays"
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run.run")] == ["checkpoint-12"]
    assert full.fingerprint == engine(tiny_model, tmp_path / "calm").finetune().fingerprint


def test_the_log_of_a_resumed_run_has_every_step_once(tiny_model, interrupted):
    engine(tiny_model, interrupted, resume_from_checkpoint=True).finetune()
    lines = [json.loads(line) for line in (interrupted.with_name("run.run") / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_ndcg@10" in line] == [0, 3, 6, 9, 12]
    assert all(line["learning_rate"] >= 0 for line in lines if "loss" in line)


def test_a_run_that_stopped_early_stays_where_it_stopped(tiny_model, tmp_path):
    settings = {"early_stopping_patience": 1, "evaluation_steps": 1, "learning_rate": 1e-9, "epochs": 10}
    with pytest.warns(UserWarning, match="gained nothing"):
        first = engine(tiny_model, tmp_path / "run", **settings).finetune()
    assert first.steps == 1
    for _ in range(2):
        with pytest.warns(UserWarning, match="gained nothing"):
            again = engine(tiny_model, tmp_path / "run", **settings, resume_from_checkpoint=True).finetune()
        assert (again.steps, again.history, again.fingerprint) == (first.steps, first.history, first.fingerprint)


def test_a_run_of_so_many_steps_stays_at_its_end(tiny_model, tmp_path):
    first = engine(tiny_model, tmp_path / "run").finetune(max_steps=7)
    again = engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune(max_steps=7)
    assert first.steps == again.steps == 7
    assert [entry["step"] for entry in again.history] == [0, 3, 6, 7]
    assert again.fingerprint == first.fingerprint


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint_and_no_adapter(tiny_model, tmp_path):
    class FromStepSix(torch.autograd.Function):
        steps = 0

        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            FromStepSix.steps += 1
            return grad * (float("nan") if FromStepSix.steps >= 6 else 1)

    class Spoilt(losses.MultipleNegativesRankingLoss):
        def forward(self, *args):
            return FromStepSix.apply(super().forward(*args))

    settings = {"loss": Spoilt, "checkpoint_save_steps": 2, "checkpoint_save_total_limit": 1, "val_dataset": None}
    with pytest.raises(NonFiniteLossError, match="gradient of norm nan at step 6"):
        engine(tiny_model, tmp_path / "run", val_fraction=0, **settings).finetune()
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run.run")] == ["checkpoint-4"]
    assert all(bool(torch.isfinite(w).all()) for w in weights(tmp_path / "run.run" / "checkpoint-4").values())
    assert not (tmp_path / "run").exists()


def test_trained_weights_survive_a_failed_write_of_the_adapter(tiny_model, tmp_path, monkeypatch):
    calm = engine(tiny_model, tmp_path / "calm", save_checkpoints=False).finetune()
    assert not checkpoints.checkpoints(tmp_path / "calm.run"), "none was asked for, and none is needed any more"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_directory, "replace_directory", full)
    with pytest.raises(OutputDirectoryError, match="resume_from_checkpoint=True"):
        engine(tiny_model, tmp_path / "run", save_checkpoints=False).finetune()
    monkeypatch.undo()
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run.run")] == ["checkpoint-12"]

    def no_step(*args, **kwargs):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(LoraTrainer, "training_step", no_step)
    written = engine(tiny_model, tmp_path / "run", save_checkpoints=False, resume_from_checkpoint=True).finetune()
    assert written.fingerprint == calm.fingerprint
    assert not checkpoints.checkpoints(tmp_path / "run.run")


@pytest.mark.slow
def test_two_runs_do_not_train_into_one_directory(tiny_model, tmp_path):
    with checkpoints.only_run(tmp_path / "run.run"):
        code = f"""
from tests.helpers.training import checkpointing_engine
checkpointing_engine({tiny_model!r}, {str(tmp_path / "run")!r}).finetune()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "into which another process is training" in done.stderr
    assert engine(tiny_model, tmp_path / "run").finetune().steps == 12


def test_callbacks_are_called_at_evaluations_and_saves(tiny_model, tmp_path):
    class Heard(TrainerCallback):
        evaluations, saves = [], 0

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.evaluations.append((state.global_step, metrics["eval_ndcg@10"]))

        def on_save(self, args, state, control, **kwargs):
            self.saves += 1

    heard = Heard()
    result = engine(tiny_model, tmp_path / "run").finetune(callbacks=[heard])
    assert heard.evaluations == [(entry["step"], entry["metrics"]["ndcg@10"]) for entry in result.history]
    assert heard.saves == 3


def test_resuming_twice_logs_nothing_twice_and_a_fresh_start_keeps_the_old_log(tiny_model, interrupted):
    for _ in range(3):
        engine(tiny_model, interrupted, resume_from_checkpoint=True).finetune()
    log = interrupted.with_name("run.run") / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_ndcg@10" in line] == [0, 3, 6, 9, 12]
    engine(tiny_model, interrupted.with_name("new"), save_checkpoints=False).finetune()
    first = (interrupted.with_name("new.run") / "log.jsonl").read_text()
    engine(tiny_model, interrupted.with_name("new"), save_checkpoints=False).finetune()
    assert (interrupted.with_name("new.run") / "previous.log.jsonl").read_text() == first


def test_a_wrong_training_argument_leaves_an_old_run_where_it_is(tiny_model, interrupted):
    with pytest.raises(ConfigError):
        engine(tiny_model, interrupted).finetune(lr_scheduler_type="kosine")
    assert latest_checkpoint(interrupted.with_name("run.run")).name == "checkpoint-5"


def test_another_rank_of_the_lora_does_not_fit(tiny_model, interrupted):
    with pytest.raises(AdapterError, match="do not fit"):
        engine(
            tiny_model, interrupted, resume_from_checkpoint=True, lora_config=LoraConfig(r=4),
            allow_changes=["lora_config"],
        ).finetune()  # fmt: skip


def test_with_other_prompts_the_base_is_evaluated_again(tiny_model, interrupted):
    again = engine(
        tiny_model, interrupted, resume_from_checkpoint=True, query_prompt="query : ", allow_changes=["query_prompt"]
    ).finetune()
    assert again.history[0]["metrics"] == again.base_change.metrics
    assert [entry["step"] for entry in again.history] == [0, 6, 9, 12]
