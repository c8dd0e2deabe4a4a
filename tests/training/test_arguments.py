"""What `finetune(...)` takes in transformers' own words, and what the engine adds to it."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from transformers import TrainerCallback

from llama_index_lora_embed.config import ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.core.errors import ConfigError, DeviceMemoryError
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.arguments import check_user_arguments
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.efficiency import auto_batch_size
from llama_index_lora_embed.training.objectives.collator import make_groups
from llama_index_lora_embed.training.objectives.plan import training_plan
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.conftest import make_dataset, shown
from tests.training.checkpointing.test_checkpoints import engine, weights
from tests.training.objectives.test_losses import model_with_lora


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
        ({"lr_scheduler_type": "kosine", "optim": "x"}, ["lr_scheduler_type='kosine'", "optim='x'"]),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ["lr_scheduler_type='reduce_lr_on_plateau'"]),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ["lr_scheduler_type='warmup_stable_decay'"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps=0"]),
        ({"max_steps": 0}, ["max_steps=0"]),
        ({"max_steps": "many", "weight_decay": -1}, ["max_steps='many'", "weight_decay=-1"]),
        ({"gradient_checkpointing": "yes"}, ["gradient_checkpointing='yes'"]),
        ({"report_to": "nothing_there"}, ["report_to='nothing_there'"]),
        ({"report_to": "dvclive"}, ["report_to='dvclive': .*install"]),
        ({"warmup_ratio": 1.5}, ["warmup_ratio=1.5"]),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, ["warmup_ratio together with warmup_steps=3"]),
        ({"dataloader_prefetch_factor": 2}, ["dataloader_prefetch_factor=2"]),
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


def test_trying_the_arguments_settles_no_device(tmp_path):
    PartialState._reset_state()
    check_user_arguments(TrainingSettings(), None, {"max_grad_norm": 0.5, "torch_empty_cache_steps": 3})
    assert not PartialState._shared_state


def test_a_sampler_of_the_users_own_goes_with_a_loss_of_their_own(tiny_model, tmp_path):
    made = engine(tiny_model, tmp_path / "run", loss=losses.MultipleNegativesRankingLoss, epochs=1)
    assert made.finetune(batch_sampler="no_duplicates").steps > 0


def test_warmup_can_be_told_as_a_share_of_the_steps(tiny_model, tmp_path, monkeypatch):
    rates = watch(monkeypatch, rate)
    engine(tiny_model, tmp_path / "run", epochs=4, save_checkpoints=False).finetune(warmup_ratio=0.5)
    assert rates[:7] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
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
    monkeypatch.setattr(auto_batch_size, "_can_run_out", lambda device: True)


def test_a_step_that_does_not_fit_is_explained_with_numbers(tiny_model, tmp_path, monkeypatch):
    small_memory(monkeypatch, 5)
    with pytest.raises(DeviceMemoryError) as caught:
        engine(tiny_model, tmp_path / "run", batch_size=16).finetune()
    text = str(caught.value)
    assert "batch_size=16 with texts of up to 12 tokens" in text
    assert "ObjectiveSettings(mini_batch_size=4)" in text
    assert "batch_size=8" in text
    assert "batch_size='auto'" in text
    assert "max_seq_length" not in text, "texts of twelve tokens are short"


@pytest.mark.parametrize(
    ("step", "advice"),
    [
        ({"batch_size": 32, "tokens": 400}, ["mini_batch_size=8", "batch_size=16", "max_seq_length=200"]),
        ({"batch_size": 64, "tokens": 100, "pieces": 4}, ["from 4 to 2", "batch_size=32", "max_seq_length=64"]),
        ({"batch_size": 8, "tokens": 40, "pieces": 1}, ["batch_size=4"]),
        ({"batch_size": 32, "tokens": 40, "can_piece": False}, ["batch_size=16"]),
        ({"batch_size": 2, "tokens": 40, "can_piece": False}, []),
    ],
    ids=shown,
)
def test_only_what_can_be_done_is_advised_where_memory_runs_out(step, advice):
    error = auto_batch_size.out_of_memory(error=torch.OutOfMemoryError("CUDA out of memory."), **step)
    assert all(piece in error.hint for piece in advice)
    assert ("mini_batch_size" in error.hint) == any("mini_batch" in p or "from" in p for p in advice)
    assert ("batch_size=" in error.hint.replace("batch_size='auto'", "").replace("mini_batch_size", "")) == any(
        p.startswith("batch_size=") for p in advice
    )
    assert ("max_seq_length" in error.hint) == any("max_seq_length" in p for p in advice)
    assert "a smaller base" in error.hint


def test_the_probe_takes_the_longest_texts_of_a_step_of_all_processes(tiny_model, tmp_path, monkeypatch):
    """A step of two processes has twice as many passages; each process encodes its own share of them."""
    seen = []
    compute = LoraTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        sizes = {letter: sum(len(t) for n, t in inputs.items() if n[0] == letter and n.endswith("input_ids"))
                 for letter in "qp"}  # fmt: skip
        loss = compute(self, model, inputs, *args, **kwargs)
        seen.append((sizes, tuple(inputs["label"].shape), float(loss.detach())))
        return loss

    def trainer_of(world, objective):
        model = model_with_lora(tiny_model)
        dataset = make_dataset()
        plan = training_plan(model, dataset, make_groups(dataset, False), None, TrainingSettings(), objective)
        plan.inputs["data_collator"].world = world
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True, report_to="none",
            remove_unused_columns=False, **plan.arguments,
        )  # fmt: skip
        return LoraTrainer(
            best_so_far=CheckpointSelection(None), precision="fp32", warmup_ratio=None, recorded={}, model=model,
            args=arguments, **plan.inputs,
        )  # fmt: skip

    monkeypatch.setattr(LoraTrainer, "compute_loss", watched)
    for objective in (ObjectiveSettings(), ObjectiveSettings(mini_batch_size=3)):
        one, two = trainer_of(1, objective), trainer_of(2, objective)
        loss = two.loss
        assert auto_batch_size._fits(one)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        assert auto_batch_size._fits(two)
        monkeypatch.setattr(distributed, "world_size", lambda: 1)
        assert two.loss is loss
        assert not any(p.grad is not None for p in two.model.parameters())
        assert seen[0][:2] == ({"q": 16, "p": 8}, (16, 8))
        assert seen[1][:2] == ({"q": 16, "p": 8}, (32, 16)), "its share is as much as all of one process"
        assert seen[1][2] > 0
        seen.clear()


def test_two_processes_take_the_size_that_fits_both(tiny_model, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"""
import logging
import torch
from llama_index_lora_embed import LoraFinetuneEngine
from llama_index_lora_embed.training.efficiency import auto_batch_size
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.conftest import make_dataset

logging.basicConfig(level=logging.INFO)
compute = LoraTrainer.compute_loss

def limited(self, model, inputs, *args, **kwargs):
    most = max(len(t) for name, t in inputs.items() if name.endswith("input_ids"))
    whole = sum(len(t) for name, t in inputs.items() if name.endswith("input_ids"))
    loss = getattr(self.loss, "whole", self.loss)
    if distributed.rank() == 1 and (most if loss.cached else whole) > 5:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return compute(self, model, inputs, *args, **kwargs)

LoraTrainer.compute_loss = limited
auto_batch_size._can_run_out = lambda device: True
engine = LoraFinetuneEngine(
    make_dataset(passages=70), {tiny_model!r}, {str(tmp_path / "run")!r}, batch_size="auto", epochs=1,
    val_dataset=make_dataset(passages=10, seed=7, prefix="v"), device="cpu", precision="fp32", show_progress_bar=False,
)
steps = engine.finetune().steps
with open({str(tmp_path)!r} + f"/steps-{{distributed.rank()}}", "w") as file:  # what two print at once runs together
    file.write(str(steps))
""")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"steps-{rank}").read_text() for rank in (0, 1)] == ["2", "2"], "a step has 64 passages"
    assert done.stderr.count("takes StepSize(rows=32, pieces=4)") == 2


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
