"""Connecting to a cluster, and the checks before work is sent there."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from llama_index_lora_embed.core.errors import ClusterError, ConfigError, LoraEmbedError, OutputDirectoryError
from llama_index_lora_embed.distributed import check_resources, check_storage, check_travels, check_workers, connect
from llama_index_lora_embed.distributed.cluster import on_each_node
from tests.helpers.other_cluster import cluster_of, python_with

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.extended]


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_without_a_cluster_is_named_with_what_to_do(address):
    code = f"""
from llama_index_lora_embed.distributed import connect
from llama_index_lora_embed.core.errors import ClusterError
try:
    connect({address!r})
except ClusterError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"no connection to a Ray cluster at {address!r}" in done.stdout, done.stderr
    assert "ray start --head" in done.stdout


def test_without_an_address_a_cluster_that_others_left_is_not_joined():
    code = """
import ray
from llama_index_lora_embed.distributed import connect
connect(num_cpus=1, object_store_memory=100_000_000)
print("CPUs:", ray.cluster_resources()["CPU"])
"""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # sockets lie there, whose paths must be short
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert "CPUs: 1.0" in done.stdout, done.stderr


def test_a_connected_process_stays_connected(cluster):
    import ray

    before = ray.get_runtime_context().get_job_id()
    connect("auto")
    assert ray.get_runtime_context().get_job_id() == before


def test_too_few_resources_are_named_with_what_is_missing_and_what_fits(cluster):
    check_resources(2, {"CPU": 1, "GPU": 0})
    with pytest.raises(ClusterError) as caught:
        check_resources(3, {"CPU": 1, "GPU": 0})
    assert "Missing: 1 CPUs." in str(caught.value)
    assert "num_workers=2 would fit" in str(caught.value)
    with pytest.raises(ClusterError, match=r"Missing: 1 GPUs\. Otherwise"):
        check_resources(1, {"CPU": 1, "GPU": 1})
    with pytest.raises(ConfigError, match="num_workers=0"):
        check_resources(0, {"CPU": 1})


def test_a_worker_that_needs_more_than_any_node_has_is_no_question_of_the_total(cluster, monkeypatch):
    import ray

    node = {"Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    with pytest.raises(ClusterError, match="Missing: nodes large enough"):
        check_resources(1, {"CPU": 3})


def test_nodes_with_this_version_of_the_package_are_accepted(cluster):
    check_workers()


@pytest.mark.parametrize(
    ("version", "problem"), [("0.0.1", "0.0.1"), (None, "no importable package (ModuleNotFoundError")]
)
def test_no_work_is_sent_to_a_cluster_with_another_version_or_without_the_package(
    tiny_model, tmp_path, version, problem
):
    folder = tmp_path / "files"
    folder.mkdir()
    with cluster_of(python_with(version, tmp_path / "machine")) as address:
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.other_cluster", address, tiny_model, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,  # Ray's workers import from the folder of the program that calls them
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert list(told) == ["embed_dataset", "generate_queries", "ray_transform", "run_finetune"]
    for call, error in told.items():
        assert "1 of 1 node(s) without this version" in error, call
        assert f"): {problem}" in error, call
        assert "pip install" in error, call
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["nodes.jsonl", "train.json", "val.json"], "neither outputs nor journals"


def test_a_folder_that_all_can_write_is_accepted_and_left_empty(cluster, tmp_path):
    check_storage(tmp_path / "runs")
    check_storage("memory://runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_nobody_can_write_is_named(cluster, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputDirectoryError, match="storage_path=") as caught:
        check_storage(tmp_path / "file" / "runs")
    assert caught.value.problems[0].startswith("this process: ")


def test_a_folder_that_only_this_process_sees_is_refused(cluster, tmp_path, monkeypatch):
    from llama_index_lora_embed.distributed import cluster as module

    def elsewhere(look):
        """As on a node that mounts another disk under the same path."""
        hidden = tmp_path.rename(tmp_path.with_name("hidden"))
        try:
            return on_each_node(look)
        finally:
            import shutil

            shutil.rmtree(tmp_path)
            hidden.rename(tmp_path)

    monkeypatch.setattr(module, "on_each_node", elsewhere)
    with pytest.raises(OutputDirectoryError, match="1 place") as caught:
        check_storage(tmp_path)
    assert "does not see the files" in caught.value.problems[0]


def test_objects_that_cannot_travel_are_named_with_the_reason():
    class Client:
        def __init__(self):
            self.lock = threading.Lock()

    check_travels(llm=None, adapter="runs/handbook")
    with pytest.raises(ConfigError) as caught:
        check_travels(llm=Client(), adapter="runs/handbook")
    (problem,) = caught.value.problems
    assert problem.startswith("llm: TypeError: ")
    assert "lock" in problem


def test_without_ray_the_package_imports_and_the_room_names_the_extra():
    code = """
import sys
sys.modules["ray"] = None
import llama_index_lora_embed.cli
from llama_index_lora_embed import FinetuneConfig
try:
    from llama_index_lora_embed.distributed import connect
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'llama-index-lora-embed[ray]'" in done.stdout, done.stderr


def test_errors_come_back_from_workers_as_they_were(cluster):
    import ray

    @ray.remote(max_retries=0)
    def fail():
        raise ClusterError("a", "b", "c", ["d"])

    with pytest.raises(LoraEmbedError, match="got a; expected b"):
        ray.get(fail.remote())
