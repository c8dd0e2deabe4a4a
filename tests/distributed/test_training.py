"""Runs on Ray Train: the adapter of an undisturbed run after a lost worker, a lost driver, and on an object store."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from llama_index_lora_embed import run_finetune
from llama_index_lora_embed.core.errors import ClusterError, ConfigError, NonFiniteLossError, OutputDirectoryError
from llama_index_lora_embed.distributed import RayLauncher
from llama_index_lora_embed.distributed.training import _Place
from tests.helpers.launched_training import KillOnce, files_of, tiny_config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.extended


@pytest.fixture(scope="module")
def calm(cluster, tiny_model, tmp_path_factory):
    """An undisturbed run of two gloo workers: its result, its folder, and the progress that it told."""
    folder, told = tmp_path_factory.mktemp("calm"), []
    result = run_finetune(tiny_config(tiny_model, folder), launcher=RayLauncher(2, show=told.append))
    assert result.best_step > 0, "otherwise adapters would be equal because they are untrained"
    return result, folder, told


@pytest.mark.slow
def test_two_workers_train_and_the_caller_gets_adapter_result_and_progress(calm):
    result, folder, told = calm
    assert result.steps == 18
    assert result.adapter_path == str(folder / "adapter")
    assert len(result.compare().base.per_query) == 20
    assert told[0].startswith("step 0 of 18: ")
    assert (folder / "adapter.run" / "log.jsonl").read_text().count('"loss"') > 3
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["adapter", "adapter.run", "train.json", "val.json"], "nobody asked for checkpoints"


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_of_the_adapter(calm, tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path)
    result = run_finetune(config, launcher=RayLauncher(2, max_failures=1), callbacks=[KillOnce(tmp_path, 0, 5)])
    assert (tmp_path / "killed-0").read_text() == "5", "that of the worker which writes"
    assert files_of(tmp_path / "adapter") == files_of(calm[1] / "adapter")
    assert result.history == calm[0].history


@pytest.mark.slow
def test_a_run_goes_on_after_more_failures_than_it_may_have(calm, tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path, save_checkpoints=True, checkpoint_save_total_limit=2)
    launcher = RayLauncher(2, max_failures=0, storage_path=tmp_path / "storage", name="handbook")
    with pytest.raises(ClusterError, match="a training that failed more than 0 time"):
        run_finetune(config, launcher=launcher, callbacks=[KillOnce(tmp_path, 1, 5)])
    resumed = config.replace(output=config.output.replace(resume_from_checkpoint=True))
    run_finetune(resumed, launcher=launcher)
    assert files_of(tmp_path / "adapter") == files_of(calm[1] / "adapter")
    kept = [path for path in (tmp_path / "storage" / "handbook").iterdir() if path.is_dir()]
    assert len(kept) == 2, "nor is there one of which Ray does not know"
    assert _Place.of(str(tmp_path / "storage"), "handbook", resume=False).name == "handbook-2", "a new run is another"


@pytest.mark.slow
def test_a_killed_driver_costs_nothing_of_the_adapter(calm, tiny_model, tmp_path):
    code = (
        "import sys; from pathlib import Path; from llama_index_lora_embed import run_finetune; "
        "from llama_index_lora_embed.distributed import RayLauncher, connect; "
        "from tests.helpers.launched_training import KillOnce, tiny_config; folder = Path(sys.argv[2]); "
        "connect(num_cpus=2, object_store_memory=100_000_000); kill = KillOnce(folder, 0, 7, of_parent=True); "
        "run_finetune(tiny_config(sys.argv[1], folder), launcher=RayLauncher(2), callbacks=[kill])"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_model, str(tmp_path)], cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL
    told = []
    config = tiny_config(tiny_model, tmp_path, resume_from_checkpoint=True)
    run_finetune(config, launcher=RayLauncher(2, show=told.append))
    assert files_of(tmp_path / "adapter") == files_of(calm[1] / "adapter")
    assert not [line for line in told if line.startswith("step 5 of 18: loss")], "these steps are not trained again"


@pytest.mark.slow
def test_an_error_that_would_come_again_is_not_tried_again(cluster, tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path, learning_rate=1e30)
    with pytest.raises(NonFiniteLossError):
        run_finetune(config, launcher=RayLauncher(1, max_failures=5))


@pytest.mark.slow
def test_checkpoints_lie_on_an_object_store(tiny_model, tmp_path):
    """In a process of its own, whose cluster knows the store from its environment."""
    moto = pytest.importorskip("moto.server", reason="make test-all installs it")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    script = ROOT / "tests" / "helpers" / "launched_on_s3.py"
    store = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"tests.helpers.{script.stem}", tiny_model, str(tmp_path)],
            env={**os.environ, **store, "AWS_DEFAULT_REGION": "us-east-1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=1200,
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "killed after 5 steps, equal to the calm run"


def test_too_few_resources_say_what_would_fit(cluster, tiny_model, tmp_path):
    with pytest.raises(ClusterError, match=r"num_workers=2 would fit"):
        run_finetune(tiny_config(tiny_model, tmp_path), launcher=RayLauncher(3))
    with pytest.raises(ClusterError, match=r"Missing: 1 GPUs"):
        run_finetune(tiny_config(tiny_model, tmp_path), launcher=RayLauncher(1, use_gpu=True))


def test_a_storage_that_cannot_be_shared_or_written_is_refused(cluster, tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path)
    with pytest.raises(ConfigError, match="the memory of one process"):
        run_finetune(config, launcher=RayLauncher(1, storage_path="memory://runs"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="storage_path="):
        run_finetune(config, launcher=RayLauncher(1, storage_path=tmp_path / "file" / "runs"))


def test_a_live_model_and_a_named_checkpoint_are_refused_before_there_is_a_cluster(tiny_model, tmp_path):
    import torch

    config = tiny_config(tiny_model, tmp_path)
    with pytest.raises(ConfigError, match="cannot be sent") as raised:
        run_finetune(config, launcher=RayLauncher(1), callbacks=[Holder(torch.nn.Linear(2, 2))])
    assert "a live model (Linear)" in raised.value.problems[0]
    place = tmp_path / "adapter.run" / "checkpoint-2"
    place.mkdir(parents=True)
    named = config.replace(output=config.output.replace(resume_from_checkpoint=str(place)))
    with pytest.raises(ConfigError, match="True for the last checkpoint in the storage"):
        run_finetune(named, launcher=RayLauncher(1))


class Holder(TrainerCallback):
    """A callback that holds a model."""

    def __init__(self, model):
        self.model = model
