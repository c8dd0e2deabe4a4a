"""Runs in several processes of this machine: the same adapter whatever starts them, also after one was killed."""

import signal
import sys

import pytest
from transformers import TrainerCallback

from llama_index_lora_embed import LoraEmbedding, run_finetune
from llama_index_lora_embed.core.errors import ConfigError, LoraEmbedError, ModelNotFoundError
from llama_index_lora_embed.engines.launcher import ProcessLauncher
from tests.helpers.launched_training import KillOnce, files_of, tiny_config


@pytest.fixture(scope="module")
def calm(tiny_model, tmp_path_factory):
    """An undisturbed run in two processes: its result and its folder."""
    folder = tmp_path_factory.mktemp("calm")
    result = run_finetune(tiny_config(tiny_model, folder), launcher=ProcessLauncher(2))
    assert result.best_step > 0, "otherwise adapters would be equal because they are untrained"
    return result, folder


@pytest.mark.slow
@pytest.mark.extended
def test_torchrun_trains_in_two_processes_and_hands_over_the_result(calm):
    result, folder = calm
    assert result.steps == 18, "70 passages in batches of twice four, two epochs"
    assert result.adapter_path == str(folder / "adapter")
    assert LoraEmbedding(folder / "adapter", device="cpu").fingerprint == result.fingerprint
    assert len(result.compare().base.per_query) == 20, "the evaluations come along"
    assert not list((folder / "adapter.run").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.extended
def test_a_killed_process_costs_nothing_of_the_adapter(tiny_model, tmp_path, calm):
    launcher = ProcessLauncher(2, max_failures=1)
    result = run_finetune(tiny_config(tiny_model, tmp_path), launcher=launcher, callbacks=[KillOnce(tmp_path, 1, 5)])
    assert (tmp_path / "killed-1").read_text() == "5"
    assert files_of(tmp_path / "adapter") == files_of(calm[1] / "adapter")
    assert result.history == calm[0].history
    assert not list((tmp_path / "adapter.run").glob("checkpoint-*")), "nobody asked for checkpoints"


@pytest.mark.slow
@pytest.mark.extended
def test_accelerate_starts_the_same_run(tiny_model, tmp_path, calm):
    run_finetune(tiny_config(tiny_model, tmp_path), launcher=ProcessLauncher(2, "accelerate"))
    assert files_of(tmp_path / "adapter") == files_of(calm[1] / "adapter")


@pytest.mark.slow
@pytest.mark.extended
def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on(tiny_model, tmp_path, calm):
    config = tiny_config(tiny_model, tmp_path, checkpoint_save_steps=100)
    parent = KillOnce(tmp_path, 0, 5, signal.SIGINT, of_parent=True)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(config, launcher=ProcessLauncher(2), callbacks=[parent])
    assert len(list((tmp_path / "adapter.run").glob("checkpoint-*"))) == 1
    resumed = config.replace(output=config.output.replace(resume_from_checkpoint=True))
    run_finetune(resumed, launcher=ProcessLauncher(2))
    assert files_of(tmp_path / "adapter") == files_of(calm[1] / "adapter")


@pytest.mark.slow
@pytest.mark.extended
def test_an_error_of_a_process_is_raised_here(tmp_path, tiny_model):
    config = tiny_config(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        run_finetune(config, launcher=ProcessLauncher(1, max_failures=2))
    with pytest.raises(LoraEmbedError, match=r"exit code 1 of torchrun; expected processes that train to the end"):
        run_finetune(
            tiny_config(tiny_model, tmp_path), launcher=ProcessLauncher(1), callbacks=[KillOnce(tmp_path, 0, 1)]
        )


def test_objects_that_cannot_be_sent_are_named_together(tmp_path):
    import torch

    with pytest.raises(ConfigError) as raised:
        run_finetune(
            tiny_config("base", tmp_path),
            loss=lambda model: model,
            callbacks=[Holder(torch.nn.Linear(2, 2))],
            launcher=ProcessLauncher(2),
            hub_token=sys.stderr,
        )
    told = "\n".join(raised.value.problems)
    assert "loss=<function" in told
    assert "a live model (Linear)" in told
    assert "hub_token=" in told
    assert not (tmp_path / "adapter.run").exists()


class Holder(TrainerCallback):
    """A callback that holds a model."""

    def __init__(self, model):
        self.model = model


@pytest.mark.parametrize("arguments", [{"num_workers": 0}, {"max_failures": -1}, {"program": "mpirun"}])
def test_wrong_arguments_of_a_launcher_are_refused(arguments):
    with pytest.raises(ConfigError, match=f"{next(iter(arguments))}="):
        ProcessLauncher(**arguments)
