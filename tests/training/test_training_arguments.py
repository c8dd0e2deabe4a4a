"""What `finetune(...)` takes in transformers' own words, and what the engine adds to it."""

import json
import logging

import pytest
import torch
from transformers import TrainerCallback

from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.errors import ConfigError, DeviceMemoryError
from llama_index_lora_embed.training import memory
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.training.test_checkpoints import engine, weights


def watch(monkeypatch, of):
    """Note something of the trainer at each step."""
    seen = []
    step = LoraTrainer.training_step

    def watched(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        seen.append(of(self))
        return result

    monkeypatch.setattr(LoraTrainer, "training_step", watched)
    return seen


def rate(trainer):
    return trainer.optimizer.param_groups[0]["lr"] / trainer.args.learning_rate


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_linearly(tiny_model, tmp_path, monkeypatch):
    rates = watch(monkeypatch, rate)
    engine(tiny_model, tmp_path / "run", epochs=10).finetune()
    assert len(rates) == 30
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert rates[15] == pytest.approx(15 / 27)


def test_the_rate_can_fall_along_a_cosine(tiny_model, tmp_path, monkeypatch):
    rates = watch(monkeypatch, rate)
    engine(tiny_model, tmp_path / "run", epochs=10).finetune(lr_scheduler_type="cosine")
    progress = (15 - 3) / 27
    assert rates[15] == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item()))


def test_gradients_are_accumulated_over_steps(tiny_model, tmp_path):
    result = engine(tiny_model, tmp_path / "run").finetune(gradient_accumulation_steps=3)
    assert result.steps == 4, "twelve batches, three to a step"


def test_gradient_checkpointing_changes_memory_and_not_what_is_learnt(tiny_model, tmp_path):
    class Kept(TrainerCallback):
        """Counts the tensors that the first step's forward pass keeps for the backward pass."""

        def __init__(self):
            self.count = 0
            self.hooks = None

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
                self.hooks.__enter__()

        def pack(self, tensor):
            self.count += 1
            return tensor

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.hooks.__exit__(None, None, None)

    plain, checkpointed = Kept(), Kept()
    engine(tiny_model, tmp_path / "plain", precision="fp32").finetune(callbacks=[plain])
    engine(tiny_model, tmp_path / "less", precision="fp32").finetune(
        callbacks=[checkpointed], gradient_checkpointing=True
    )
    assert all(
        torch.allclose(w, weights(tmp_path / "less")[n], atol=1e-6) for n, w in weights(tmp_path / "plain").items()
    )
    assert 0 < checkpointed.count < plain.count / 2


def test_gradient_checkpointing_and_gradcache_are_not_combined(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        engine(tiny_model, tmp_path / "run", objective=ObjectiveSettings(mini_batch_size=4)).finetune(
            gradient_checkpointing=True
        )


def test_training_stops_when_nothing_more_is_gained(tiny_model, tmp_path):
    patient = engine(tiny_model, tmp_path / "a", learning_rate=1e-9, epochs=10, evaluation_steps=1)
    with pytest.warns(UserWarning, match="gained nothing"):
        assert patient.finetune().steps == 30
    impatient = engine(
        tiny_model, tmp_path / "b", learning_rate=1e-9, epochs=10, evaluation_steps=1, early_stopping_patience=3
    )
    with pytest.warns(UserWarning, match="gained nothing"):
        result = impatient.finetune()
    assert [entry["step"] for entry in result.history] == [0, 1, 2, 3]
    assert result.steps == 3


def test_the_best_step_can_be_chosen_by_another_measure(tiny_model, tmp_path):
    result = engine(tiny_model, tmp_path / "run", best_metric="hit@1", evaluation_steps=1).finetune()
    by_step = {entry["step"]: entry["metrics"]["hit@1"] for entry in result.history}
    assert by_step[result.best_step] > by_step[0]
    with pytest.raises(ConfigError, match=r"best_metric='ndgc'.*hit@1"):
        engine(tiny_model, tmp_path / "other", best_metric="ndgc").finetune()


def test_callbacks_are_called(tiny_model, tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    count = Count()
    engine(tiny_model, tmp_path / "run").finetune(callbacks=[count])
    assert count.steps == 12


def test_report_to_reaches_tensorboard(tiny_model, tmp_path):
    pytest.importorskip("tensorboard")
    engine(tiny_model, tmp_path / "run").finetune(report_to="tensorboard")
    assert list((tmp_path / "run.run").rglob("events.out.tfevents*"))


def test_reports_and_logging_do_not_stand_in_the_way_of_a_resume(tiny_model, tmp_path):
    engine(tiny_model, tmp_path / "run").finetune(logging_steps=5)
    again = engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune(logging_steps=2)
    assert again.steps == 12
    with pytest.raises(ConfigError, match="train_kwargs"):
        engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune(max_grad_norm=0.5)


def test_the_log_holds_loss_rate_and_measures(tiny_model, tmp_path):
    result = engine(tiny_model, tmp_path / "run", save_checkpoints=False).finetune()
    lines = [json.loads(line) for line in (tmp_path / "run.run" / "log.jsonl").read_text().splitlines()]
    assert {line["step"]: line["eval_ndcg@10"] for line in lines if "eval_ndcg@10" in line} == {
        entry["step"]: pytest.approx(entry["metrics"]["ndcg@10"], abs=1e-4) for entry in result.history[1:]
    }
    assert {"step", "loss", "grad_norm", "learning_rate", "epoch", "time"} <= lines[0].keys()


def test_the_seed_decides_everything(tiny_model, tmp_path):
    first, again, other = (
        engine(tiny_model, tmp_path / name, seed=seed).finetune().fingerprint
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def small_memory(monkeypatch, holds):
    """A device that cannot hold more than so many texts at once."""
    compute = LoraTrainer.compute_loss

    def limited(self, model, inputs, *args, **kwargs):
        rows = max(t.shape[0] for name, t in inputs.items() if name.endswith("input_ids"))
        whole = sum(t.shape[0] for name, t in inputs.items() if name.endswith("input_ids"))
        pieces = getattr(self.loss, "mini_batch_size", None) or getattr(self.loss, "cached", False)
        if (rows if pieces else whole) > holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "compute_loss", limited)
    monkeypatch.setattr(memory, "_can_run_out", lambda device: True)


def test_a_step_that_does_not_fit_is_explained_with_numbers(tiny_model, tmp_path, monkeypatch):
    small_memory(monkeypatch, 5)
    with pytest.raises(DeviceMemoryError) as caught:
        engine(tiny_model, tmp_path / "run", batch_size=16).finetune()
    text = str(caught.value)
    assert "batch_size=16 with texts of up to 12 tokens" in text
    assert "ObjectiveSettings(mini_batch_size=4)" in text
    assert "batch_size=8" in text
    assert "max_seq_length=64" in text
    assert "batch_size='auto'" in text


def test_batch_size_auto_keeps_the_batch_and_computes_it_in_pieces_that_fit(tiny_model, tmp_path, monkeypatch, caplog):
    kwargs = {"precision": "fp32", "epochs": 2}
    whole = engine(tiny_model, tmp_path / "whole", batch_size=32, **kwargs).finetune()
    small_memory(monkeypatch, 5)
    with caplog.at_level(logging.INFO, "llama_index_lora_embed"):
        auto = engine(tiny_model, tmp_path / "auto", batch_size="auto", **kwargs).finetune()
    assert "StepSize(rows=32, pieces=4)" in caplog.text
    assert auto.steps == whole.steps
    ours, theirs = weights(tmp_path / "auto"), weights(tmp_path / "whole")
    assert all(torch.allclose(w, theirs[n], atol=1e-5) for n, w in ours.items())


def test_batch_size_auto_halves_the_batch_of_another_loss(tiny_model, tmp_path, monkeypatch, caplog):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    small_memory(monkeypatch, 20)
    with caplog.at_level(logging.INFO, "llama_index_lora_embed"):
        engine(tiny_model, tmp_path / "run", batch_size="auto", loss=MultipleNegativesRankingLoss, epochs=1).finetune()
    assert "StepSize(rows=8, pieces=None)" in caplog.text


def test_batch_size_auto_says_when_nothing_fits(tiny_model, tmp_path, monkeypatch):
    small_memory(monkeypatch, 0)
    with pytest.raises(DeviceMemoryError, match="pieces=1"):
        engine(tiny_model, tmp_path / "run", batch_size="auto").finetune()


def test_on_a_processor_batch_size_auto_is_the_default(tiny_model, tmp_path):
    auto = engine(tiny_model, tmp_path / "auto", batch_size="auto").finetune()
    assert auto.fingerprint == engine(tiny_model, tmp_path / "plain", batch_size=32).finetune().fingerprint
