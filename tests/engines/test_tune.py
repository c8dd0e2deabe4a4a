"""A sweep: what it chooses, what it says about the choice, and that a kill changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config.space import Range
from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.engines.tune import Trial, _choice, tune
from tests.helpers.launched_training import files_of, tiny_config

ROOT = Path(__file__).parents[2]
SPACE = {"learning_rate": Range(1e-4, 1e-2), "lora_r": [2, 4]}
CONFIG = {"batch_size": 16, "epochs": 1, "lora_config": None, "evaluation_steps": 0}


@pytest.fixture(scope="module")
def calm(tiny_model, tmp_path_factory):
    """An undisturbed sweep of three trials on two folds: result, folder, lines, and the adapter as it was then."""
    folder, told = tmp_path_factory.mktemp("calm"), []
    result = tune(tiny_config(tiny_model, folder, **CONFIG), SPACE, trials=3, folds=2, show=told.append)
    return result, folder, told, files_of(folder / "adapter")


def plain(trials):
    return [(trial.values, trial.tuned) for trial in trials]


@pytest.mark.slow
def test_a_sweep_trains_with_the_settings_that_are_best_on_the_folds(calm):
    result, folder, told, _ = calm
    assert len(result.trials) == 3
    best = max(result.trials, key=lambda trial: np.mean(trial.tuned))
    assert result.values == best.values
    assert result.gain == pytest.approx(np.mean(best.gains))
    manifest = json.loads((folder / "adapter" / "finetune.json").read_text())
    assert manifest["settings"]["learning_rate"] == best.values["learning_rate"]
    assert manifest["settings"]["lora_r"] == best.values["lora_r"]
    assert LoraEmbedding(folder / "adapter", device="cpu").fingerprint == result.result.fingerprint
    assert result.result.adapter_path == str(folder / "adapter")
    assert not list((folder / "adapter.tune").glob("trial-*")), "the runs of finished trials are removed"
    assert [line.split(":")[0] for line in told[:3]] == ["trial 1 of 3", "trial 2 of 3", "trial 3 of 3"]


@pytest.mark.slow
def test_the_verdict_is_on_data_that_had_no_part_in_any_choice(calm):
    result, *_ = calm
    assert result.comparison.queries == 20, "the validation data"
    chosen_on = result.result.val_dataset
    assert chosen_on is not None
    assert not set(chosen_on.queries.values()) & set(result_queries(calm)), "steps are chosen on others"
    assert "This data had no part in any choice." in str(result)
    assert f"(optimism {result.optimism:+.3f})" in str(result)


def result_queries(calm):
    return json.loads((calm[1] / "val.json").read_text())["queries"].values()


@pytest.mark.slow
def test_a_finished_sweep_trains_no_trial_again(tiny_model, calm):
    result, folder, *_ = calm
    again, told = None, []
    again = tune(tiny_config(tiny_model, folder, **CONFIG), SPACE, trials=2, folds=2, show=told.append)
    assert plain(again.trials) == plain(result.trials)[:2]
    assert not any(line.startswith("trial") for line in told)


@pytest.mark.slow
@pytest.mark.extended
def test_a_killed_sweep_ends_as_it_would_have_ended(tiny_model, tmp_path, calm):
    code = (
        "import sys; from pathlib import Path; from tests.engines.test_tune import CONFIG, SPACE; "
        "from llama_index_lora_embed.engines.tune import tune; "
        "from tests.helpers.launched_training import tiny_config; "
        "tune(tiny_config(sys.argv[1], Path(sys.argv[2]), **CONFIG), SPACE, trials=3, folds=2, show=print)"
    )
    command = [sys.executable, "-c", code, tiny_model, str(tmp_path)]
    for run in ("trial-0/fold-1", "trial-1/fold-0", "final-*"):
        process = subprocess.Popen(command, cwd=ROOT)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(f"adapter.tune/{run}.run/checkpoint-*")):
            assert process.poll() is None, "it has ended before"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    result = tune(tiny_config(tiny_model, tmp_path, **CONFIG), SPACE, trials=3, folds=2)
    assert plain(result.trials) == plain(calm[0].trials)
    assert files_of(tmp_path / "adapter") == calm[3]


@pytest.mark.slow
def test_settings_that_cannot_be_trained_are_a_failed_trial(tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path, **CONFIG)
    result = tune(config, {"learning_rate": [1e30, 1e-3]}, trials=3, folds=2)
    failed = [trial for trial in result.trials if trial.error]
    assert result.values == {"learning_rate": 1e-3}
    assert failed, "one of three draws of two values"
    assert all("NonFiniteLossError" in trial.error for trial in failed)
    assert "NonFiniteLossError" in str(result)


def test_a_folder_of_another_sweep_is_refused(tiny_model, tmp_path, calm):
    with pytest.raises(ConfigError, match=r"a sweep with another config, space, folds in .*adapter\.tune"):
        tune(tiny_config(tiny_model, calm[1], **{**CONFIG, "epochs": 3}), {"lora_r": [2]}, trials=3, folds=3)


def test_a_sweep_without_data_for_the_verdict_is_refused(tmp_path):
    config = tiny_config("base", tmp_path, val_dataset=None, val_fraction=0)
    with pytest.raises(ConfigError, match="a sweep without validation data"):
        tune(config, SPACE)


def test_the_nested_gain_is_that_of_settings_chosen_on_the_other_folds():
    trials = [
        Trial(0, {"lora_r": 2}, (0.5, 0.5, 0.5), (0.9, 0.4, 0.5)),
        Trial(1, {"lora_r": 4}, (0.5, 0.5, 0.5), (0.5, 0.6, 0.6)),
        Trial(2, {"lora_r": 8}, (), (), "NonFiniteLossError: a loss of nan"),
    ]
    best, gain, nested = _choice(trials)
    assert best.number == 0
    assert gain == pytest.approx(0.1)
    # without the first fold trial 1 is best, whose gain there is 0; without the second or third one trial 0 is
    assert nested == pytest.approx((0.0 - 0.1 + 0.0) / 3)
