"""`train` and `config-schema`: the same run as in Python, flags over files, exit codes, Ctrl-C."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_index_lora_embed import FinetuneConfig, run_finetune
from llama_index_lora_embed.config.overrides import config_fields
from tests.helpers.cli import commands, lora_embed, result_of


def test_train_ends_with_the_adapter_of_the_same_call_in_python(workplace):
    config = FinetuneConfig.from_file("run.yaml")
    expected = run_finetune(config.replace(output=config.output.replace(model_output_path="runs/python")))
    found = result_of("train --config run.yaml")
    assert found["fingerprint"] == expected.fingerprint
    assert found["tuned_metrics"] == expected.tuned_metrics
    assert Path(found["adapter_path"]) == workplace / "runs/new"


def test_flags_win_over_the_file_with_and_without_their_group(workplace):
    found = result_of("train --config run.yaml --epochs 1 --training.batch_size 4 --no-fused-lora --max-seq-length 12")
    assert found["steps"] == 6
    assert found["truncation"]["length_after"] == 12


def test_every_field_is_a_flag_with_its_description():
    flags = {name: option for option in commands()["train"].params for name in option.opts}
    for field in config_fields():
        option = flags["--" + field.name.replace("_", "-")]
        assert field.description
        assert " ".join(option.help.replace("\\[", "[").split()).startswith(field.description)


def test_wrong_values_of_file_and_flags_are_told_together(workplace):
    text = Path("run.yaml").read_text().replace("epochs: 8", "epochs: 0")
    Path("wrong.yaml").write_text(text)
    done = lora_embed("train --config wrong.yaml --learning-rate fast --mining.rounds 0 --objective.guide")
    assert done.exit_code == 1
    assert done.stdout == ""
    for line in (
        "training.epochs=0: expected a whole number of at least 1",
        "training.learning_rate='fast': expected a number above 0",
        "mining.rounds=0: expected a whole number of at least 1",
    ):
        assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_says_its_progress_in_lines_where_there_is_no_terminal(workplace):
    done = lora_embed("train --config run.yaml")
    assert done.exit_code == 0, done.output
    steps = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert steps[0].startswith("step 0 of 24: hit@5 ")
    assert any("loss" in line and "learning rate" in line for line in steps)
    assert done.stdout.splitlines()[0].startswith("BETTER on 20 human-written queries")
    assert "runs/new" in done.stdout


@pytest.mark.parametrize(
    ("epochs", "rate", "requirement", "code"),
    [(8, 5e-3, "better", 0), (8, 5e-3, "no-worse", 0), (1, 1e-9, "better", 3), (1, 1e-9, "no-worse", 0)],
)
def test_a_verdict_below_what_is_required_is_exit_code_3(workplace, epochs, rate, requirement, code):
    found = result_of(
        f"train --config run.yaml --epochs {epochs} --learning-rate {rate} --require {requirement}", code=code
    )
    assert found["verdict"] == ("BETTER" if epochs == 8 else "NO CLEAR DIFFERENCE")


def test_a_run_without_evaluation_meets_no_requirement(workplace):
    line = "train --dataset train.json --model-id base --val-fraction 0 --epochs 1 --model-output-path runs/x"
    done = lora_embed(f"{line} --require no-worse")
    assert done.exit_code == 3
    assert "below --require no-worse" in done.stderr
    assert "NOT EVALUATED" in done.stdout


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--num-workers 2", "--num-workers without --launcher torchrun, accelerate or ray"),
        ("--launcher torchrun --use-gpu", "--use-gpu without --launcher ray"),
        ("--launcher accelerate --num-workers 0", "num_workers=0: expected a whole number of at least 1"),
    ],
)
def test_options_of_a_launcher_that_do_not_fit_are_refused(workplace, flags, told):
    for command in ("train", "train --dry-run", "tune"):
        done = lora_embed(f"{command} --config run.yaml {flags}")
        assert done.exit_code == 1
        assert told in done.stderr


@pytest.mark.slow
@pytest.mark.extended
def test_two_processes_train_and_one_json_object_is_printed(workplace):
    line = [sys.executable, "-m", "llama_index_lora_embed.cli", "train", "--config", "run.yaml", "--json"]
    more = ["--launcher", "torchrun", "--num-workers", "2", "--batch-size", "4", "--precision", "fp32"]
    done = subprocess.run([*line, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["adapter_path"]) == workplace / "runs/new"
    assert found["steps"] == 24
    assert done.stderr.count("step 0 of 24") == 1, "one process tells progress"


def test_a_wrong_space_of_a_sweep_is_refused(workplace):
    done = lora_embed("tune --config run.yaml --space '{lora_r: [0], epoch: [1]}'")
    assert done.exit_code == 1
    assert "lora_r=0: expected a whole number of at least 1" in done.stderr
    assert "epoch: expected one of tune, batch_size, epochs" in done.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(workplace):
    line = [sys.executable, "-m", "llama_index_lora_embed.cli", "train", "--config", "run.yaml", "--epochs", "300"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        told = ""
        while "step 20 " not in told:
            told += process.stderr.readline()
            assert process.poll() is None, told
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted. The checkpoint" in rest
    assert "Traceback" not in rest
    found = result_of("train --config run.yaml --epochs 300 --resume-from-checkpoint true")
    assert found["steps"] == 900


def test_the_schema_is_that_of_the_configuration():
    assert result_of("config-schema") == FinetuneConfig.model_json_schema()
