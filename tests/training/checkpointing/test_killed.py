import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llama_index_lora_embed.training.teacher import scores_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def order():
    """Train in a child process, which may be killed."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.killed_training"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )

    def give(model, path, kill=None, teacher=None):
        process.stdin.write(json.dumps({"model": model, "path": str(path), "kill": kill, "teacher": teacher}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield give
    process.stdin.close()
    process.wait(timeout=60)


def content(path):
    """The adapter, byte by byte, and what the manifest says of the training."""
    manifest = json.loads((path / "finetune.json").read_text())
    kept = {name: manifest[name] for name in ("fingerprint", "metrics", "best_step", "verdict", "files")}
    return (path / "adapter_model.safetensors").read_bytes(), kept


def test_twenty_kills_at_random_moments_end_with_the_adapter_of_a_calm_run(tiny_model, tmp_path, order):
    calm = order(tiny_model, tmp_path / "calm")
    assert calm["code"] == 0
    rng = random.Random(0)
    kills = [{"after": rng.uniform(0.05, calm["seconds"])} for _ in range(11)]
    kills += [{"in_save": rng.randint(1, 60)} for _ in range(5)]
    kills += [{"in_evaluation": rng.randint(1, 3)} for _ in range(3)]
    kills += [{"in_write": rng.randint(1, 3)}]
    rng.shuffle(kills)
    killed, seen, path = Counter(), set(), tmp_path / "killed"
    while kills:
        kill = kills.pop()
        answer = order(tiny_model, path, kill)
        seen.add(answer["checkpoint"])
        if answer["code"] == -signal.SIGKILL:
            killed.update(kill.keys())
        else:  # it was done before the moment came: start over, with an earlier one of the kind
            assert answer["code"] == 0
            assert content(path) == content(tmp_path / "calm")
            kills.append({kind: moment / 2 if kind == "after" else 1 + moment // 2 for kind, moment in kill.items()})
            path = path.with_name(path.name + "x")
    assert killed == {"after": 11, "in_save": 5, "in_evaluation": 3, "in_write": 1}
    assert len(seen) > 3, "the kills must have met the run at different steps"
    assert order(tiny_model, path)["code"] == 0
    assert content(path) == content(tmp_path / "calm")
    left = [p.name for p in tmp_path.iterdir() if "staging" in p.name]
    assert not [name for name in left if name.startswith(f".{path.name}.staging")][3:], "killed writes may leave few"


@pytest.mark.extended
def test_a_teachers_scores_outlive_a_kill_and_the_adapter_is_that_of_a_calm_run(
    tiny_model, cross_encoder, tmp_path, order
):
    calm, path = tmp_path / "calm", tmp_path / "killed"
    assert order(tiny_model, calm, teacher=cross_encoder)["code"] == 0
    scores = scores_file(calm).read_text().splitlines()
    assert len(scores) > 3
    for kill in ({"in_scoring": 3}, {"in_scoring": 1}, {"in_save": 30}, {"in_evaluation": 2}):
        assert order(tiny_model, path, kill, cross_encoder)["code"] == -signal.SIGKILL
    assert order(tiny_model, path, teacher=cross_encoder)["code"] == 0
    assert scores_file(path).read_text().splitlines() == scores, "each part was scored once, in the same batches"
    assert content(path) == content(calm)
    assert json.loads((path / "finetune.json").read_text())["settings"]["teacher"]["name"] == "cross-encoder0"
