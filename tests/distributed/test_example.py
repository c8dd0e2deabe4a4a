"""The example runs from a folder of documents to an answer from Chroma, in one command."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WORDS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.extended
def test_the_example_goes_from_a_folder_to_a_collection(tiny_model, tmp_path):
    rng = random.Random(0)
    (tmp_path / "docs").mkdir()
    for number in range(12):
        sentences = [" ".join(rng.sample(WORDS, 8)).capitalize() + "." for _ in range(4)]
        (tmp_path / "docs" / f"{number}.md").write_text(
            f"# Title {WORDS[number]} {WORDS[-number]}\n\n" + " ".join(sentences)
        )
    command = [sys.executable, str(ROOT / "examples" / "ray_pipeline.py"), str(tmp_path / "docs"), "--base", tiny_model]
    command += ["--out", str(tmp_path / "out"), "--epochs", "1", "--query", "w1 w2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "12 nodes in 1 files" in done.stdout
    assert f"12 vectors in {str(tmp_path / 'out' / 'chroma')!r}" in done.stdout
    assert done.stdout.strip().splitlines()[-1][:2] in ("0.", "1.", "-0"), "an answer with its score"
