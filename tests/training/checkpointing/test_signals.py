import logging
import signal
import threading

import pytest
from safetensors.torch import load_file

from llama_index_lora_embed.training.checkpointing.checkpoints import checkpoints
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.checkpointing.signals import StopRequest
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.helpers.training import checkpointing_engine as engine
from tests.helpers.training import signal_in


@pytest.mark.parametrize("saving", [True, False])
def test_ctrl_c_saves_a_checkpoint_and_stops_and_the_resumed_run_ends_like_a_calm_one(
    tiny_model, tmp_path, monkeypatch, saving
):
    signal_in(monkeypatch, LoraTrainer, "training_step", signal.SIGINT, 7)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        engine(tiny_model, tmp_path / "run", save_checkpoints=saving).finetune()
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints(tmp_path / "run.run")[-1].name == "checkpoint-7"
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    calm = engine(tiny_model, tmp_path / "calm").finetune()
    resumed = engine(tiny_model, tmp_path / "run", save_checkpoints=saving, resume_from_checkpoint=True).finetune()
    assert resumed.history == calm.history
    assert resumed.fingerprint == calm.fingerprint


def test_sigterm_saves_a_checkpoint_and_then_does_what_the_program_wants(tiny_model, tmp_path, monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("term"))
    try:
        signal_in(monkeypatch, LoraTrainer, "training_step", signal.SIGTERM, 2)
        with pytest.raises(SystemExit) as caught:
            engine(tiny_model, tmp_path / "run").finetune()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 128 + signal.SIGTERM
    assert heard == ["term"]
    assert [p.name for p in checkpoints(tmp_path / "run.run")] == ["checkpoint-2"]


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(tiny_model, tmp_path, monkeypatch):
    signal_in(monkeypatch, CheckpointSelection, "evaluate", signal.SIGINT, 2)
    with pytest.raises(KeyboardInterrupt):
        engine(tiny_model, tmp_path / "run").finetune()
    monkeypatch.undo()
    assert [p.name for p in checkpoints(tmp_path / "run.run")] == ["checkpoint-3"]
    calm = engine(tiny_model, tmp_path / "calm").finetune()
    resumed = engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune()
    assert [entry["step"] for entry in resumed.history] == [0, 3, 6, 9, 12], "the interrupted evaluation is repeated"
    assert resumed.history == calm.history
    assert resumed.fingerprint == calm.fingerprint


def test_signals_in_an_evaluation_and_in_its_repetition_lose_nothing(tiny_model, tmp_path, monkeypatch):
    calm = engine(tiny_model, tmp_path / "calm").finetune()
    for call in (2, 1, 1):  # the base is evaluated only in the first run
        signal_in(monkeypatch, CheckpointSelection, "evaluate", signal.SIGINT, call)
        with pytest.raises(KeyboardInterrupt):
            engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune()
        monkeypatch.undo()
        assert [p.name for p in checkpoints(tmp_path / "run.run")] == ["checkpoint-3"]
    resumed = engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune()
    assert resumed.history == calm.history
    assert resumed.fingerprint == calm.fingerprint


def test_a_signal_after_an_evaluation_does_not_separate_its_metrics_from_its_weights(tiny_model, tmp_path, monkeypatch):
    calm = engine(tiny_model, tmp_path / "calm").finetune()
    signal_in(monkeypatch, CheckpointSelection, "_keep", signal.SIGINT, 5)
    with pytest.raises(KeyboardInterrupt):
        engine(tiny_model, tmp_path / "run").finetune()
    monkeypatch.undo()
    resumed = engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune()
    assert (resumed.best_step, resumed.fingerprint) == (calm.best_step, calm.fingerprint)


def test_a_signal_in_the_last_step_still_leaves_a_checkpoint(tiny_model, tmp_path, monkeypatch):
    signal_in(monkeypatch, CheckpointSelection, "save", signal.SIGINT, 3)  # steps 5, 10 and 12
    with pytest.raises(KeyboardInterrupt):
        engine(tiny_model, tmp_path / "run").finetune()
    monkeypatch.undo()
    assert checkpoints(tmp_path / "run.run")[-1].name == "checkpoint-12"
    resumed = engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune()
    assert resumed.fingerprint == engine(tiny_model, tmp_path / "calm").finetune().fingerprint


def test_a_second_ctrl_c_stops_at_once(tiny_model, tmp_path, monkeypatch):
    signal_in(monkeypatch, LoraTrainer, "training_step", signal.SIGINT, 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        engine(tiny_model, tmp_path / "run").finetune()
    assert checkpoints(tmp_path / "run.run") == []


def test_a_second_signal_of_another_kind_does_not_hide_the_first():
    def both() -> None:
        with StopRequest():
            signal.raise_signal(signal.SIGTERM)
            assert seen == []
            signal.raise_signal(signal.SIGINT)

    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            both()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_an_ignored_signal_stays_ignored(tiny_model, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal_in(monkeypatch, LoraTrainer, "training_step", signal.SIGINT, 2)
        assert engine(tiny_model, tmp_path / "run").finetune().steps == 12
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_works_in_a_thread(tiny_model, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(engine(tiny_model, tmp_path / "run").finetune()))
    thread.start()
    thread.join()
    assert results[0].steps == 12


def test_the_user_is_told_what_happens(tiny_model, tmp_path, monkeypatch, caplog):
    signal_in(monkeypatch, LoraTrainer, "training_step", signal.SIGINT, 4)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        engine(tiny_model, tmp_path / "run").finetune()
    assert "SIGINT: training stops after this step and saves a checkpoint" in caplog.text
    assert "stopped at step 4" in caplog.text
    assert "resume_from_checkpoint=True" in caplog.text
    assert load_file(tmp_path / "run.run" / "checkpoint-4" / "adapter_model.safetensors").keys()
