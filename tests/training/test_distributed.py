"""Two processes that train together, started as users start them, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_index_lora_embed.training.teacher import scores_file
from tests.helpers.training import weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# accelerate's name for several processes on one machine; without GPUs they run on the processor
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


def run(launcher, model, path, **orders):
    file = path.with_name(path.name + ".orders")
    file.write_text(json.dumps({"model": model, "path": str(path), **orders}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = ["-m", "tests.helpers.distributed_training", str(file)]
    return subprocess.run([*launcher, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def said(path, rank=0):
    return json.loads(path.with_name(f"{path.name}.said-{rank}").read_text())


def gradient(path, rank=0):
    stored = load_file(path.with_name(f"{path.name}.gradient-{rank}"))
    return {name.removeprefix("module."): tensor for name, tensor in stored.items()}


@pytest.mark.extended
def test_three_processes_cache_hidden_states(tiny_model, tmp_path):
    launcher = [*TORCHRUN[:-1], "3"]
    done = run(launcher, tiny_model, tmp_path / "run", arguments={"batch_size": 4, "lora_layers": 0.5})
    assert done.returncode == 0, done.stderr
    assert said(tmp_path / "run", 2) == said(tmp_path / "run")


@pytest.fixture(scope="module")
def alone(tiny_model, tmp_path_factory):
    """One process with batches of 32."""
    path = tmp_path_factory.mktemp("alone") / "run"
    done = run([sys.executable], tiny_model, path, arguments={"batch_size": 32})
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize(
    ("launcher", "orders"),
    [
        (TORCHRUN, {}),
        pytest.param(ACCELERATE, {}, marks=pytest.mark.extended),
        pytest.param(TORCHRUN, {"objective": {"mini_batch_size": 4}}, marks=pytest.mark.extended),
    ],
    ids=["torchrun", "accelerate", "gradcache"],
)
def test_two_processes_learn_what_one_does_with_the_same_batch(tiny_model, tmp_path, alone, launcher, orders):
    path = tmp_path / "run"
    done = run(launcher, tiny_model, path, **{"arguments": {"batch_size": 16}, **orders})
    assert done.returncode == 0, done.stderr
    expected = gradient(alone)
    for rank in (0, 1):
        ours = gradient(path, rank)
        assert ours.keys() == expected.keys()
        assert all(torch.allclose(ours[n], expected[n], atol=1e-5, rtol=1e-5) for n in expected)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3, "the comparison is not one of zeros"
    assert said(path, 0) == said(path, 1), "every process gets the result"
    assert said(path)["steps"] == said(alone)["steps"]
    ours, theirs = weights(path), weights(alone)
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-3) for n in theirs)
    lines = [json.loads(line) for line in (tmp_path / "run.run" / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)), "one process writes the log"
    of_one = [json.loads(x) for x in (alone.with_name(alone.name + ".run") / "log.jsonl").read_text().splitlines()]
    first, expected_first = (next(x["loss"] for x in log if "loss" in x) for log in (lines, of_one))
    assert first == pytest.approx(expected_first, rel=1e-4), "the loss that is logged is not multiplied"
    assert not [p for p in tmp_path.iterdir() if "staging" in p.name]


@pytest.mark.extended
def test_examples_are_given_to_the_processes_in_turn(tiny_model, tmp_path):
    path, one = tmp_path / "run", tmp_path / "one"
    orders = {"pairs": True, "arguments": {"batch_size": 25, "objective": "cosine"}}
    assert (done := run(TORCHRUN, tiny_model, path, **orders)).returncode == 0, done.stderr
    orders["arguments"]["batch_size"] = 50
    assert run([sys.executable], tiny_model, one, **orders).returncode == 0
    assert said(path)["steps"] == said(one)["steps"] == 4, "a hundred examples in two epochs"
    expected = gradient(one)
    assert all(torch.allclose(g, expected[n], atol=1e-5, rtol=1e-5) for n, g in gradient(path).items())


def test_two_processes_stop_together_and_resume(tiny_model, tmp_path):
    arguments = {"batch_size": 8, "checkpoint_save_steps": 100}
    calm, path = tmp_path / "calm", tmp_path / "run"
    assert run(TORCHRUN, tiny_model, calm, arguments=arguments).returncode == 0
    stopped = run(TORCHRUN, tiny_model, path, arguments=arguments, stop_at=4)
    assert stopped.returncode != 0
    assert [p.name for p in path.with_name("run.run").glob("checkpoint-*")] == ["checkpoint-5"], stopped.stderr
    states = {p.name for p in (path.with_name("run.run") / "checkpoint-5").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    assert not path.exists()
    arguments["resume_from_checkpoint"] = True
    done = run(TORCHRUN, tiny_model, path, arguments=arguments)
    assert done.returncode == 0, done.stderr
    assert said(path)["fingerprint"] == said(calm)["fingerprint"]
    assert said(path)["history"] == said(calm)["history"]


@pytest.mark.extended
def test_two_processes_learn_one_teachers_scores(tiny_model, cross_encoder, tmp_path):
    path, alone = tmp_path / "run", tmp_path / "alone"
    arguments = {"teacher": cross_encoder, "objective": "margin_mse", "epochs": 1}
    assert run([sys.executable], tiny_model, alone, arguments={"batch_size": 32, **arguments}).returncode == 0
    done = run(TORCHRUN, tiny_model, path, arguments={"batch_size": 16, **arguments})
    assert done.returncode == 0, done.stderr
    expected = gradient(alone)
    for rank in (0, 1):
        ours = gradient(path, rank)
        assert all(torch.allclose(ours[n], expected[n], atol=1e-5, rtol=1e-5) for n in expected)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    files = [scores_file(out).read_text().splitlines() for out in (path, alone)]
    assert len(files[0]) == len(files[1]) == 1, "one process scores"


@pytest.mark.extended
def test_an_error_of_the_writing_process_reaches_all(tiny_model, tmp_path):
    path = tmp_path / "run"
    assert run(TORCHRUN, tiny_model, path, arguments={"epochs": 1, "batch_size": 16}).returncode == 0
    again = {"epochs": 1, "batch_size": 16, "resume_from_checkpoint": True, "temperature": 0.1}
    done = run(TORCHRUN, tiny_model, path, arguments=again)
    assert done.returncode != 0
    assert done.stderr.count("temperature: 0.05 then, 0.1 now") == 2
