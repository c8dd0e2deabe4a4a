"""`window="auto"`: windows where many passages are truncated, decided once, and said wherever the run is described."""

import re
import warnings
from functools import partial
from pathlib import Path

import pytest
from sentence_transformers.sentence_transformer import losses

from llama_index_lora_embed import FinetuneConfig, LabelledPairs, LoraEmbedding, evaluate_retrieval, run_finetune
from llama_index_lora_embed.engines.doctor import examine
from llama_index_lora_embed.engines.dry_run import dry_run
from llama_index_lora_embed.engines.run import prepare
from llama_index_lora_embed.engines.starting_model import as_decided
from llama_index_lora_embed.models.adapter_directory import Manifest
from llama_index_lora_embed.models.windows import window_of
from tests.conftest import make_dataset, make_engine
from tests.helpers.adapters import random_adapter
from tests.helpers.long_passages import long_passages
from tests.helpers.training import stop_at

LONG = long_passages("last", passages=16, words=90)  # the tiny model has positions for 64 tokens
VAL = long_passages("last", passages=8, seed=1, words=90)
SHORT = make_dataset(16)


def run(model, path, dataset=LONG, window="auto", **kwargs):
    settings = {"precision": "fp32", "val_dataset": VAL, "epochs": 1, **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_engine(model, path, dataset, window=window, **settings).finetune()


def loaded(model, path, dataset=LONG, **arguments):
    """The model that a run of these arguments trains."""
    config = {"model_id": model, "model_output_path": str(path / "x"), "val_fraction": 0.0, "device": "cpu"}
    loss = arguments.pop("loss", None)
    return prepare({**config, "window": "auto", **arguments}, dataset, None, loss=loss).load()[0]


@pytest.fixture(scope="module")
def auto(tiny_model, tmp_path_factory):
    """The result of a run on long passages."""
    return run(tiny_model, tmp_path_factory.mktemp("auto") / "a")


def test_where_passages_are_truncated_the_run_is_the_one_with_windows_of_the_bases_positions(
    auto, tiny_model, tmp_path
):
    asked = run(tiny_model, tmp_path / "a", window=64)
    assert auto.fingerprint == asked.fingerprint
    assert (auto.window, auto.summary, auto.base_change) == (64, asked.summary, asked.base_change)
    assert auto.base_change.name == "base, windows of 64 tokens"
    base = LoraEmbedding(base_model=tiny_model, device="cpu")
    assert auto.base_metrics == pytest.approx(evaluate_retrieval(base, VAL).metrics), "as installed, without windows"


def test_result_manifest_and_report_say_which_windows(auto):
    manifest = Manifest.read(Path(auto.adapter_path))
    assert (manifest.window, manifest.settings["window"], manifest.truncation["read_in"]) == (64, 64, 64)
    assert "in windows of 64 tokens, 0 are truncated" in str(auto)
    page = auto.write_report().read_text(encoding="utf-8")
    assert "base, windows of 64 tokens" in page
    assert "window 64 " in " ".join(re.sub("<[^>]+>", " ", page).split())


def test_short_passages_are_read_without_windows(tiny_model, tmp_path):
    results = [run(tiny_model, tmp_path / str(w), SHORT, window=w, val_dataset=None) for w in ("auto", None)]
    assert results[0].fingerprint == results[1].fingerprint
    assert [result.window for result in results] == [None, None]
    assert Manifest.read(tmp_path / "auto").settings["window"] is None


def test_an_interrupted_run_goes_on_with_the_same_windows(auto, tiny_model, tmp_path, monkeypatch):
    again = partial(run, tiny_model, tmp_path / "a")
    stop_at(monkeypatch, 1, again)
    for window in ("auto", 64):
        assert again(resume_from_checkpoint=True, window=window, save_checkpoints=True).fingerprint == auto.fingerprint


def test_dry_run_and_doctor_say_what_the_run_will_do(auto, tiny_model, tmp_path):
    config = FinetuneConfig.from_arguments(
        model_id=tiny_model, model_output_path=str(tmp_path / "x"), window="auto", batch_size=8, device="cpu"
    )
    planned = dry_run(config, seconds=0.1, dataset=LONG, val_dataset=VAL)
    assert planned.truncation == auto.truncation
    LONG.save_json(tmp_path / "train.json")
    found = examine(config.replace(data=config.data.replace(dataset=str(tmp_path / "train.json"))), seconds=0.1)
    assert "in windows of 64 tokens" in str(found)
    assert found.problems == []


def test_an_adapter_that_was_trained_keeps_its_reading(auto, tiny_model, tmp_path):
    plain = random_adapter(tiny_model, tmp_path / "plain", 1)
    assert window_of(loaded(tiny_model, tmp_path, continue_from=str(plain))) is None
    assert window_of(loaded(tiny_model, tmp_path, SHORT, continue_from=auto.adapter_path)) == 64
    narrow = random_adapter(tiny_model, tmp_path / "narrow", 1, window=16)
    result = run(tiny_model, tmp_path / "a", continue_from=str(narrow))
    assert (result.window, Manifest.read(tmp_path / "a").settings["window"]) == (16, None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tune": "query"},
        {"max_seq_length": 60},
        {"loss": losses.CachedMultipleNegativesRankingLoss},
        {"dataset": LabelledPairs(list(LONG.corpus.values()), list(LONG.corpus.values())[::-1], [0.5, 1.0] * 8)},
    ],
    ids=["an index", "a length", "a loss", "pairs"],
)
def test_nothing_is_decided_where_the_user_has_fixed_the_reading_or_windows_were_not_tried(
    tiny_model, tmp_path, arguments
):
    assert window_of(loaded(tiny_model, tmp_path)) == 64
    assert window_of(loaded(tiny_model, tmp_path, **arguments)) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (3, 1.5e-3)),
        ({"window": 64}, (3, 1.5e-3)),
        ({"batch_size": 8}, (3, 1.5e-3)),
        ({"window": None}, (5, 1e-3)),
        ({"epochs": 5}, (5, 1e-3)),
        ({"learning_rate": 1e-4}, (5, 1e-4)),
        ({"preset": "best"}, (8, 1e-3)),
        ({"preset": "fast"}, (2, 1e-3)),
    ],
)
def test_runs_in_windows_have_fewer_epochs_unless_something_is_given(given, expected, tiny_model, tmp_path):
    many = long_passages("last", passages=201, words=90)
    config = {"model_id": tiny_model, "model_output_path": str(tmp_path / "x"), "val_fraction": 0.0, "device": "cpu"}
    prepared = prepare({**config, **given}, many, None)
    model, _, parent, _ = prepared.load()
    training = as_decided(prepared.config, model, parent).training
    assert (training.epochs, training.learning_rate) == expected
    few = prepare({**config, **given}, LONG, None)
    small = as_decided(few.config, model, parent).training
    defaults = few.config.training
    assert (small.epochs, small.learning_rate) == (defaults.epochs, defaults.learning_rate), "fewer than 200 passages"


def test_the_run_and_its_dry_run_take_the_fewer_epochs(tiny_model, tmp_path):
    many = long_passages("last", passages=201, words=90)
    arguments = {"model_id": tiny_model, "model_output_path": str(tmp_path / "x"), "val_fraction": 0.0, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = dry_run(FinetuneConfig.from_arguments(**arguments), dataset=many, seconds=0.1)
        config = FinetuneConfig.from_arguments(**arguments, show_progress_bar=False)
        result = run_finetune(config, dataset=many)
    assert (said.trial.steps, result.steps) == (12, 12)  # three epochs of four batches of up to 64
    manifest = Manifest.read(Path(result.adapter_path))
    assert (manifest.settings["epochs"], manifest.settings["learning_rate"]) == (3, 1.5e-3)
