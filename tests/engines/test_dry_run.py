"""A dry run says what the run then does; the doctor collects what is wrong."""

import os

import pytest

from llama_index_lora_embed import FinetuneConfig, run_finetune
from llama_index_lora_embed.config import QueryGeneratorSettings
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.engines.doctor import examine
from llama_index_lora_embed.engines.dry_run import dry_run
from tests.conftest import make_dataset
from tests.helpers.labelled_pairs import make_pairs
from tests.helpers.llms import FakeLLM

QUIET = {"batch_size": 8, "epochs": 2, "learning_rate": 5e-3, "device": "cpu", "show_progress_bar": False}


def config_of(model, path, **arguments):
    return FinetuneConfig.from_arguments(model_id=model, model_output_path=str(path / "out"), **{**QUIET, **arguments})


def test_a_dry_run_says_steps_and_truncation_of_the_run_and_writes_nothing(tiny_model, tmp_path):
    config = config_of(tiny_model, tmp_path, max_seq_length=10)
    data = {"dataset": make_dataset(), "val_dataset": make_dataset(passages=10, seed=7, prefix="v")}
    planned = dry_run(config, seconds=0.1, **data)
    assert os.listdir(tmp_path) == []
    done = run_finetune(config, **data)
    assert planned.trial.steps == done.steps == 6
    assert planned.trial.precision == done.precision
    assert planned.truncation == done.truncation
    assert planned.evaluations == len(done.history) == 3
    assert planned.training["queries"] == 48
    assert planned.validation["queries"] == 20
    assert planned.trial.tried >= 2
    assert planned.train_seconds == pytest.approx(planned.trial.step_seconds * 6)
    assert "steps: 6 of 8, 3 per epoch" in str(planned)


def test_a_dry_run_on_nodes_asks_no_llm(tiny_model, tmp_path, nodes):
    llm = FakeLLM()
    config = config_of(tiny_model, tmp_path, query_generators=(QueryGeneratorSettings(kind="llm"),), val_fraction=0.0)
    planned = dry_run(config, seconds=0.1, nodes=nodes, llm=llm)
    assert llm.calls == 0
    assert "The LLM was not asked" in str(planned)
    assert planned.validation is None
    assert planned.data_report is not None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ({"teacher": "cross_encoder"}, "teacher's scores are not"),
        ({"tune": "query"}, "were not tried"),
        ({"mining": {"num_negatives": 1, "rounds": 2}}, "Mining hard negatives"),
    ],
)
def test_what_is_not_in_the_estimate_is_named(tiny_model, cross_encoder, tmp_path, more, note):
    more = {name: cross_encoder if value == "cross_encoder" else value for name, value in more.items()}
    assert note in str(dry_run(config_of(tiny_model, tmp_path, **more), seconds=0.1, dataset=make_dataset()))


def test_a_dry_run_on_labelled_pairs(tiny_model, tmp_path):
    planned = dry_run(config_of(tiny_model, tmp_path), seconds=0.1, dataset=make_pairs())
    assert planned.trial.steps > 0
    assert planned.evaluation_seconds > 0


def test_a_dry_run_raises_what_the_run_would_raise(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="best_metric"):
        dry_run(config_of(tiny_model, tmp_path, best_metric="nothing"), dataset=make_dataset())


def test_the_doctor_measures_a_sample_where_there_is_no_data(tiny_model, tmp_path):
    found = examine(config_of(tiny_model, tmp_path), seconds=0.1)
    assert found.problems == []
    assert found.sample
    assert found.model["dimensions"] == 32
    assert found.environment.precision == found.run.trial.precision
    assert "1,000 passages" in str(found)
    assert found.environment.versions["torch"] in str(found)


def test_the_doctor_collects_problems(tmp_path):
    missing = examine(config_of(str(tmp_path / "missing"), tmp_path))
    assert missing.model == {}
    assert any("missing" in problem for problem in missing.problems)
