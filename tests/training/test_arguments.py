"""What `finetune(...)` takes in transformers' own words, and what the engine adds to it."""

import json
import re

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from transformers import TrainerCallback

from llama_index_lora_embed.config import ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.conftest import shown
from tests.helpers.training import checkpointing_engine as engine
from tests.helpers.training import weights


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
    assert rates[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
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
    whole = {"precision": "fp32", "objective": ObjectiveSettings(mini_batch_size=None)}
    engine(tiny_model, tmp_path / "plain", **whole).finetune(callbacks=[plain])
    engine(tiny_model, tmp_path / "less", **whole).finetune(callbacks=[checkpointed], gradient_checkpointing=True)
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
    result = engine(
        tiny_model, tmp_path / "run", best_metric="hit@1", evaluation_steps=1, learning_rate=2e-2
    ).finetune()
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


@pytest.mark.parametrize("callbacks", [None, (), []], ids=shown)
def test_no_callbacks_are_none(tiny_model, tmp_path, callbacks):
    assert engine(tiny_model, tmp_path / "run", epochs=1).finetune(callbacks=callbacks).steps == 3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"callbacks": TrainerCallback()}, ["callbacks of type TrainerCallback"]),
        ({"callbacks": [TrainerCallback(), object()]}, ["callbacks with <object"]),
        ({"callbacks": "wandb"}, ["callbacks of type str"]),
        ({"lr": 1}, ["lr=1: expected a training argument"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps=0"]),
        ({"max_steps": 0}, ["max_steps=0"]),
        ({"max_steps": "many", "weight_decay": -1}, ["max_steps='many'", "weight_decay=-1"]),
        ({"gradient_checkpointing": "yes"}, ["gradient_checkpointing='yes'"]),
        ({"warmup_ratio": 1.5}, ["warmup_ratio=1.5"]),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, ["warmup_ratio together with warmup_steps=3"]),
        # what the engine has an argument for
        ({"output_dir": "x", "seed": 5}, ["output_dir='x': .*model_output_path$", "seed=5: .* seed$"]),
        ({"num_train_epochs": 3}, ["num_train_epochs=3: .* epochs$"]),
        ({"per_device_train_batch_size": 3}, ["per_device_train_batch_size=3: .* batch_size$"]),
        ({"learning_rate": 1e-3}, ["learning_rate=0.001: .* learning_rate$"]),
        ({"eval_strategy": "steps"}, ["eval_strategy='steps': .* evaluation_steps$"]),
        (
            {"save_steps": 3, "bf16": True},
            ["save_steps=3: .* checkpoint_save_steps$", "bf16=True: .* precision='bf16'$"],
        ),
        ({"load_best_model_at_end": True}, ["load_best_model_at_end=True: .* best_metric"]),
        ({"prompts": "x"}, ["prompts='x': .* query_prompt and passage_prompt$"]),
        ({"batch_sampler": "no_duplicates"}, ["batch_sampler='no_duplicates': .* objective"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_used_is_named_before_a_base_is_looked_for(tmp_path, wrong, named):
    with pytest.raises(ConfigError) as caught:
        engine("no/such-model", tmp_path / "run").finetune(**wrong)
    assert len(caught.value.problems) == len(named)
    for problem, pattern in zip(caught.value.problems, named, strict=True):
        assert re.match(pattern, problem)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"lr_scheduler_type": "kosine"}, "kosine"),
        ({"optim": "x"}, "x is not a valid OptimizerNames"),
        ({"dataloader_prefetch_factor": 2}, "prefetch_factor"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_value_that_sentence_transformers_refuses_is_named_before_the_first_step(tiny_model, tmp_path, wrong, named):
    with pytest.raises(ConfigError, match=named):
        engine(tiny_model, tmp_path / "run").finetune(**wrong)
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "run.run").glob("checkpoint-*"))


def test_a_sampler_of_the_users_own_goes_with_a_loss_of_their_own(tiny_model, tmp_path):
    made = engine(tiny_model, tmp_path / "run", loss=losses.MultipleNegativesRankingLoss, epochs=1)
    assert made.finetune(batch_sampler="no_duplicates").steps > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_every_step_of_a_warmup_learns(tiny_model, tmp_path, monkeypatch, schedule):
    rates = watch(monkeypatch, rate)
    engine(tiny_model, tmp_path / "run", epochs=2, save_checkpoints=False).finetune(
        warmup_steps=4, lr_scheduler_type=schedule
    )
    assert rates[:5] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1])


def test_warmup_can_be_told_as_a_share_of_the_steps(tiny_model, tmp_path, monkeypatch):
    rates = watch(monkeypatch, rate)
    engine(tiny_model, tmp_path / "run", epochs=4, save_checkpoints=False).finetune(warmup_ratio=0.5)
    assert rates[:7] == pytest.approx([1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1])
    assert json.loads((tmp_path / "run" / "finetune.json").read_text())["settings"]["warmup_ratio"] == 0.5


def test_what_a_callable_makes_must_be_a_loss(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="which makes a int from the model"):
        engine(tiny_model, tmp_path / "run", loss=lambda model: 5).finetune()
    assert not (tmp_path / "run").exists()


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
        entry["step"]: pytest.approx(entry["metrics"]["ndcg@10"], abs=1e-4) for entry in result.history
    }
    of_training = next(line for line in lines if "loss" in line)
    assert {"step", "loss", "grad_norm", "learning_rate", "epoch", "time"} <= of_training.keys()


def test_the_seed_decides_everything(tiny_model, tmp_path):
    first, again, other = (
        engine(tiny_model, tmp_path / name, seed=seed).finetune().fingerprint
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other
