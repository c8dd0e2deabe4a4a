"""What a checkpoint records: all that decides what is learnt, and nothing else."""

import functools
import json
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from llama_index_lora_embed.config import MiningSettings, ObjectiveSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.models.kernels import precision
from llama_index_lora_embed.training.checkpointing.checkpoints import checkpoints, latest_checkpoint, read_record
from llama_index_lora_embed.training.checkpointing.resume import RECORDED, describe
from llama_index_lora_embed.training.trainer import LoraTrainer
from tests.conftest import make_dataset, make_engine
from tests.helpers.teachers import shared_words
from tests.helpers.training import checkpointing_engine, stop_at

MNRL = losses.MultipleNegativesRankingLoss
MINING = MiningSettings(num_negatives=1, relative_margin=None, show_progress_bar=False)


def engine(model, path, data=None, **kwargs):
    settings = {"epochs": 1, "save_checkpoints": True, "checkpoint_save_steps": 1}
    return make_engine(model, path, data, **{**settings, **kwargs})


def resumed(model, path, data=None, **kwargs):
    return engine(model, path, data, resume_from_checkpoint=True, **kwargs).finetune()


def shuffled(dataset):
    ids = list(dataset.queries)
    random.Random(1).shuffle(ids)
    return dataset.subset(ids, dataset.corpus)


def test_the_order_of_questions_and_passages_decides(tiny_model, tmp_path):
    dataset = make_dataset()
    assert dataset.digest() == shuffled(dataset).digest()
    assert dataset.order_digest() != shuffled(dataset).order_digest()
    turned = dataset.model_copy(update={"corpus": dict(reversed(dataset.corpus.items()))})
    assert dataset.order_digest() != turned.order_digest()
    assert dataset.order_digest() == make_dataset().order_digest()
    engine(tiny_model, tmp_path / "run").finetune()
    with pytest.raises(ConfigError, match=r"allow_changes=\['dataset'\]"):
        resumed(tiny_model, tmp_path / "run", shuffled(make_dataset()))


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ({"evaluation_steps": 1}, {"evaluation_steps": 0}, "evaluation_steps"),
        ({"loss": partial(MNRL, scale=20)}, {"loss": partial(MNRL, scale=1)}, "loss"),
        ({"mining": MINING}, {"mining": MINING.replace(num_negatives=2)}, "mining"),
        ({}, {"objective": ObjectiveSettings(sibling_window=0)}, "objective"),
    ],
    ids=["evaluation_steps", "loss", "mining", "objective"],
)
def test_what_decides_the_adapter_must_be_the_same(tiny_model, tmp_path, before, after, name):
    engine(tiny_model, tmp_path / "run", **before).finetune()
    with pytest.raises(ConfigError, match=rf"allow_changes=\['{name}'\]") as caught:
        resumed(tiny_model, tmp_path / "run", **after)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [name]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"mining": MINING}, {"mining": MINING.replace(show_progress_bar=True, audit=3, memory_mb=9.0)}),
        ({}, {"objective": "in_batch"}),
        ({"objective": ObjectiveSettings()}, {}),
        ({"loss": partial(MNRL, scale=5)}, {"loss": partial(MNRL, scale=5)}),
    ],
    ids=["mining", "objective by name", "objective by default", "loss"],
)
def test_what_decides_nothing_may_differ(tiny_model, tmp_path, before, after):
    first = engine(tiny_model, tmp_path / "run", **before).finetune()
    assert resumed(tiny_model, tmp_path / "run", **after).fingerprint == first.fingerprint


def test_every_name_that_is_recorded_can_be_allowed_and_no_other(tiny_model, tmp_path):
    engine(tiny_model, tmp_path / "run", mining=MINING, teacher=shared_words).finetune()
    assert read_record(latest_checkpoint(tmp_path / "run.run"))["run"].keys() == RECORDED


# losses


def scaled(scale):
    return lambda model: MNRL(model, scale=scale)


class Holder:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, model):
        return MNRL(model, scale=self.scale)


def test_losses_are_told_apart_by_their_names_and_settings(tiny_model):
    model = SentenceTransformer(tiny_model, device="cpu")
    different = [
        MNRL,
        losses.CoSENTLoss,
        partial(MNRL, scale=20),
        partial(MNRL, scale=1),
        partial(losses.CoSENTLoss, scale=1),
        scaled(20),
        scaled(1),
        lambda model: MNRL(model, scale=3),
        Holder(1),
        Holder(2),
        functools.partial(scaled, 2),
        MNRL(model, scale=20),
        MNRL(model, scale=1),
        losses.MatryoshkaLoss(model, MNRL(model, scale=20), matryoshka_dims=[8]),
        losses.MatryoshkaLoss(model, MNRL(model, scale=1), matryoshka_dims=[8]),
        losses.MatryoshkaLoss(model, MNRL(model, scale=1), matryoshka_dims=[16]),
    ]
    described = [json.dumps(describe(loss)) for loss in different]
    assert len(set(described)) == len(different)
    assert describe(MNRL) == "MultipleNegativesRankingLoss"
    assert describe(scaled(7)) == describe(scaled(7))
    assert describe(MNRL(model)) == describe(MNRL(SentenceTransformer(tiny_model, device="cpu")))


@pytest.mark.slow
def test_a_description_is_the_same_in_every_process():
    code = """
import json
from functools import partial
from llama_index_lora_embed.training.checkpointing.resume import describe
def make(model, *, names=frozenset({"a", "b", "c"})):
    return [n for n in names if n in {"x", "y", "z"}]
print(json.dumps(describe(partial(make, object(), names={"u", "v", "w"}))))
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": str(seed)}, capture_output=True, text=True,
            cwd=Path(__file__).parents[3], check=True,
        ).stdout
        for seed in (1, 2)
    }  # fmt: skip
    assert len(said) == 1
    assert "0x" not in said.pop()


def test_finetune_takes_the_engines_own_resume_and_checkpoint_arguments_for_one_run(tiny_model, tmp_path):
    path, run_dir = tmp_path / "run", tmp_path / "run.run"
    whole = make_engine(tiny_model, path, checkpoint_save_steps=5).finetune(save_checkpoints=True)
    assert [p.name for p in checkpoints(run_dir)] == ["checkpoint-5", "checkpoint-10", "checkpoint-12"]
    shutil.rmtree(run_dir / "checkpoint-12")
    other = checkpointing_engine(tiny_model, path)
    assert other.finetune(resume_from_checkpoint=True).fingerprint == whole.fingerprint
    assert not other.config.output.resume_from_checkpoint
    kept = checkpointing_engine(tiny_model, path, resume_from_checkpoint=True).finetune(resume_from_checkpoint=None)
    assert kept.fingerprint == whole.fingerprint
    assert (run_dir / "checkpoint-5").exists(), "nothing was moved aside"
    make_engine(tiny_model, path, resume_from_checkpoint=True).finetune(resume_from_checkpoint=False)
    assert not (run_dir / "checkpoint-5").exists()


def test_a_named_checkpoint_is_continued_instead_of_the_newest(tiny_model, tmp_path, monkeypatch):
    path, run_dir = tmp_path / "run", tmp_path / "run.run"
    whole = checkpointing_engine(tiny_model, path).finetune()
    loaded = []
    load = LoraTrainer.load_checkpoint
    monkeypatch.setattr(LoraTrainer, "load_checkpoint", lambda self, p: (loaded.append(p.name), load(self, p)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (run_dir / "checkpoint-5", "run.run/checkpoint-5", "~/run.run/checkpoint-5", run_dir):
        assert (
            checkpointing_engine(tiny_model, path).finetune(resume_from_checkpoint=place).fingerprint
            == whole.fingerprint
        )
    assert loaded == [*["checkpoint-5"] * 3, "checkpoint-12"]
    assert checkpointing_engine(tiny_model, path, resume_from_checkpoint="run.run/checkpoint-5").finetune().steps == 12
    assert loaded[-1] == "checkpoint-5"


def test_a_resumed_run_keeps_the_precision_that_was_found_by_trying(tiny_model, tmp_path, monkeypatch):
    def on_a_machine(faster):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        monkeypatch.setattr(precision, "_CHOSEN", {})
        monkeypatch.setattr(precision, "_seconds", lambda size, dtype: 1.0 if dtype == faster else 2.0)

    on_a_machine(torch.bfloat16)
    whole = checkpointing_engine(tiny_model, tmp_path / "whole").finetune()
    stop_at(monkeypatch, 6, checkpointing_engine(tiny_model, tmp_path / "run").finetune)
    on_a_machine(torch.float32)
    again = checkpointing_engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True).finetune()
    assert (whole.precision, again.precision) == ("bf16", "bf16")
    assert again.fingerprint == whole.fingerprint
    assert again.history == whole.history
    assert checkpointing_engine(tiny_model, tmp_path / "new").finetune().precision == "bf16", "of this process"
    monkeypatch.setattr(precision, "_CHOSEN", {})
    with pytest.raises(ConfigError, match="precision: 'bf16' then, 'fp32' now"):
        checkpointing_engine(tiny_model, tmp_path / "run", resume_from_checkpoint=True, precision="fp32").finetune()


def test_a_checkpoint_that_is_not_of_this_run_or_damaged_is_refused(tiny_model, tmp_path):
    path, named = tmp_path / "run", tmp_path / "run.run" / "checkpoint-5"
    checkpointing_engine(tiny_model, path).finetune()
    with pytest.raises(ConfigError, match=r"checkpoints/test_model'?: expected True, False or a folder"):
        make_engine(tiny_model, path, resume_from_checkpoint=tmp_path / "checkpoints" / "test_model")
    with pytest.raises(ConfigError, match="expected True, False or a folder") as caught:
        make_engine(tiny_model, tmp_path / "other").finetune(resume_from_checkpoint=named, save_checkpoints=3)
    assert len(caught.value.problems) == 2
    (named / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"checkpoint-5', which is damaged: optimizer\.pt is changed"):
        make_engine(tiny_model, path).finetune(resume_from_checkpoint=named)


def test_arguments_of_the_engine_are_not_called_unknown_in_finetune(tiny_model, tmp_path):
    with pytest.raises(ConfigError) as caught:
        make_engine(tiny_model, tmp_path / "run").finetune(evaluation_steps=5, warmup=3)
    assert caught.value.problems == [
        "evaluation_steps=5: expected it among the arguments of the engine",
        "warmup=3: expected a training argument of sentence-transformers",
    ]
