"""examples/run.yaml on the demo's data ends with the same adapter as the demo's call in Python."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import result_of

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.extended  # test_training.py compares the same on the tiny model
def test_the_demos_run_from_a_file_is_the_run_in_python(minilm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import demo

    nodes = [node for node in demo.chunk(demo.python_reference()) if len(node.text) < 800][:30]
    engine = demo.train_python(nodes, minilm, Path("runs/demo"))
    for name, dataset in (("train", engine.dataset), ("val", engine.val_dataset)):
        dataset.save_json(f"runs/demo/{name}.json")
    shutil.copy(EXAMPLES / "run.yaml", "run.yaml")
    found = result_of(f"train --config run.yaml --model-id {minilm}")
    expected = engine.finetune()
    assert found["fingerprint"] == expected.fingerprint
    assert found["tuned_metrics"] == expected.tuned_metrics
    assert found["steps"] == expected.steps > 0
    weights = (Path(path) / "adapter_model.safetensors" for path in (found["adapter_path"], expected.adapter_path))
    assert len({path.read_bytes() for path in weights}) == 1
