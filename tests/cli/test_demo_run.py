"""examples/run.yaml on the demo's data ends with the same adapter as the call in Python."""

import shutil
import sys
from pathlib import Path

import pytest

from llama_index_lora_embed import FinetuneConfig, run_finetune
from tests.helpers.cli import result_of

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.extended  # test_training.py compares the same on the tiny model
def test_the_demos_run_from_a_file_is_the_run_in_python(minilm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import demo

    nodes = [node for node in demo.chunk(demo.python_reference()) if len(node.text) < 800][:60]
    engine = demo.train_python(nodes, minilm, Path("runs/demo"))
    for name, dataset in (("train", engine.dataset), ("val", engine.val_dataset)):
        dataset.save_json(f"runs/demo/{name}.json")
    shutil.copy(EXAMPLES / "run.yaml", "run.yaml")
    found = result_of(f"train --config run.yaml --model-id {minilm} --epochs 1")
    config = FinetuneConfig.from_file("run.yaml")
    config = config.replace(
        base=config.base.replace(model_id=minilm),
        training=config.training.replace(epochs=1),
        output=config.output.replace(model_output_path="runs/python"),
    )
    expected = run_finetune(config)
    assert found["fingerprint"] == expected.fingerprint
    assert found["tuned_metrics"] == expected.tuned_metrics
    assert found["steps"] == expected.steps > 0
