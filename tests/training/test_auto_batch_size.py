import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from llama_index_lora_embed.config import ObjectiveSettings, TrainingSettings
from llama_index_lora_embed.core.errors import DeviceMemoryError
from llama_index_lora_embed.training import auto_batch_size, distributed
from llama_index_lora_embed.training.checkpointing.selection import CheckpointSelection
from llama_index_lora_embed.training.examples import make_groups
from llama_index_lora_embed.training.objectives.plan import training_plan
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.conftest import make_dataset
from tests.helpers.gradients import model_with_lora
from tests.helpers.training import checkpointing_engine as engine
from tests.helpers.training import limit_memory, weights


def test_the_trial_step_has_the_longest_texts_of_a_step_of_all_processes(tiny_model, tmp_path, monkeypatch):
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
            selection=CheckpointSelection(None), precision="fp32", warmup_ratio=None, run_record={}, model=model,
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


@pytest.mark.slow
@pytest.mark.extended
def test_two_processes_use_the_size_that_fits_both(tiny_model, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"""
import logging
import torch
from llama_index_lora_embed.training import auto_batch_size
from llama_index_lora_embed.training import distributed
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.conftest import make_dataset, make_engine

logging.basicConfig(level=logging.INFO)
compute = LoraTrainer.compute_loss

def limited(self, model, inputs, *args, **kwargs):
    most = max(len(t) for name, t in inputs.items() if name.endswith("input_ids"))
    whole = sum(len(t) for name, t in inputs.items() if name.endswith("input_ids"))
    if distributed.rank() == 1 and (most if self.loss.cached else whole) > 5:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return compute(self, model, inputs, *args, **kwargs)

LoraTrainer.compute_loss = limited
auto_batch_size._can_run_out = lambda device: True
engine = make_engine(
    {tiny_model!r}, {str(tmp_path / "run")!r}, make_dataset(passages=70), batch_size="auto", epochs=1,
    learning_rate=1e-3, precision="fp32",
)
steps = engine.finetune().steps
with open({str(tmp_path)!r} + f"/steps-{{distributed.rank()}}", "w") as file:  # not printed: two outputs would mix
    file.write(str(steps))
""")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"steps-{rank}").read_text() for rank in (0, 1)] == ["2", "2"], "a step has 64 passages"
    assert done.stderr.count("uses StepSize(batch_size=32, mini_batch_size=4)") == 2


def test_batch_size_auto_keeps_the_batch_and_computes_it_in_chunks_that_fit(tiny_model, tmp_path, monkeypatch, caplog):
    kwargs = {"precision": "fp32", "epochs": 2}
    whole = engine(tiny_model, tmp_path / "whole", batch_size=32, **kwargs).finetune()
    limit_memory(monkeypatch, 5)
    with caplog.at_level(logging.INFO, "llama_index_lora_embed"):
        auto = engine(tiny_model, tmp_path / "auto", batch_size="auto", **kwargs).finetune()
    assert "StepSize(batch_size=32, mini_batch_size=4)" in caplog.text
    assert auto.steps == whole.steps
    ours, theirs = weights(tmp_path / "auto"), weights(tmp_path / "whole")
    assert all(torch.allclose(w, theirs[n], atol=1e-5) for n, w in ours.items())


def test_batch_size_auto_halves_the_batch_of_a_loss_without_gradcache(tiny_model, tmp_path, monkeypatch, caplog):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    limit_memory(monkeypatch, 20)
    with caplog.at_level(logging.INFO, "llama_index_lora_embed"):
        engine(tiny_model, tmp_path / "run", batch_size="auto", loss=MultipleNegativesRankingLoss, epochs=1).finetune()
    assert "StepSize(batch_size=8, mini_batch_size=None)" in caplog.text


def test_the_trial_step_of_a_loss_object_runs_the_model_that_is_trained(tiny_model, tmp_path, monkeypatch):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    fits, seen = auto_batch_size._fits, []

    def watched(trainer):
        seen.append(trainer.loss.model is trainer.model)
        return fits(trainer)

    limit_memory(monkeypatch, 1000)
    monkeypatch.setattr(auto_batch_size, "_fits", watched)
    loss = MultipleNegativesRankingLoss(SentenceTransformer(tiny_model, device="cpu"))
    engine(tiny_model, tmp_path / "run", batch_size="auto", loss=loss, epochs=1).finetune()
    assert seen == [True]


def test_batch_size_auto_raises_if_nothing_fits(tiny_model, tmp_path, monkeypatch):
    limit_memory(monkeypatch, 0)
    with pytest.raises(DeviceMemoryError, match="mini_batch_size=1"):
        engine(tiny_model, tmp_path / "run", batch_size="auto").finetune()


def test_on_a_cpu_batch_size_auto_is_the_default(tiny_model, tmp_path):
    auto = engine(tiny_model, tmp_path / "auto", batch_size="auto").finetune()
    assert auto.fingerprint == engine(tiny_model, tmp_path / "plain", batch_size=32).finetune().fingerprint
