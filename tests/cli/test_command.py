"""What all commands share: errors, exit codes, streams, help pages, terminals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_index_lora_embed import cli
from tests.helpers.cli import commands, lora_embed


def program(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama_index_lora_embed.cli", *arguments], capture_output=True, text=True, **settings
    )


def test_help_imports_no_torch():
    code = (
        "import sys; from llama_index_lora_embed.cli import main; sys.argv = ['lora-embed', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print({'torch', 'transformers', 'llama_index.core', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    for arguments in (["--help"], ["train", "--help"], ["eval", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip() == "set()"


def test_without_typer_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "pip install 'llama-index-lora-embed[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["", "--help", *(f"{name} --help" for name in commands())])
def test_every_help_page_has_examples(line):
    done = lora_embed(line)
    assert done.exit_code in (0, 2)
    if line not in ("", "--help", "token revoke --help"):  # nothing to revoke without a token
        assert "Examples:" in done.stdout
        assert f"lora-embed {line.removesuffix(' --help')}" in done.stdout


def test_a_narrow_terminal_without_colours_shows_whole_names():
    environment = {**os.environ, "COLUMNS": "40", "NO_COLOR": "1"}
    done = program("train", "--help", env=environment)
    assert "--early-stopping-patience" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train --epoch 3", "--epochs"),
        ("trian", "'train'"),
        ("eval", "'MODEL'"),
        ("compare a b --require perhaps", "'better', 'no-worse'"),
    ],
)
def test_a_wrong_usage_is_exit_code_2_and_names_what_is_near(line, told):
    done = lora_embed(line)
    assert done.exit_code == 2
    assert told.lower() in done.stderr.lower()


def broken() -> None:
    Path("broken.yaml").write_text("data: [unclosed")
    Path("folder.yaml").mkdir()
    Path("list.yaml").write_text("- a")
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    Path("broken.json").write_text("{")


@pytest.mark.parametrize(
    "line",
    [
        *(
            f"train --config {name}"
            for name in ("missing.yaml", "broken.yaml", "folder.yaml", "list.yaml", "bytes.yaml")
        ),
        *(f"eval base {name}" for name in ("missing.json", "runs", "broken.json", "pairs.csv")),
        "eval base missing.csv --kind pairs",
        "train --config run.yaml --dataset runs",
        "train --config run.yaml --model-output-path train.json",
        "report runs/handbook val.json --output runs",
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_in_words(workplace, line):
    broken()
    done = lora_embed(line)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert "error: got " in done.stderr
    assert "; expected " in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(workplace):
    done = lora_embed("eval base missing.json --debug")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert "error: got 'missing.json'" in done.stderr


def test_an_unexpected_error_is_told_without_a_traceback(workplace, monkeypatch):
    from llama_index_lora_embed.evaluation import models

    monkeypatch.setattr(models, "evaluate_model", lambda *_, **__: 1 / 0)
    done = lora_embed("eval base val.json")
    assert done.exit_code == 1
    assert "error: ZeroDivisionError" in done.stderr
    assert "--debug" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_closes_stdout_is_no_error():
    line = f"{sys.executable} -m llama_index_lora_embed.cli config-schema | head -c 10"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout == '{\n  "$defs'
    assert done.stderr == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error(workplace):
    Path("locked").mkdir(mode=0o500)
    done = lora_embed("train --config run.yaml --model-output-path locked/run")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: got ")


def test_paths_are_those_of_the_working_directory(workplace, monkeypatch):
    monkeypatch.chdir("runs")
    done = lora_embed("eval handbook ../val.json")
    assert done.exit_code == 0, done.output


def test_a_shell_completes_commands_and_flags():
    for words, expected in (("lora-embed tra", "train"), ("lora-embed train --early", "--early-stopping-patience")):
        environment = {
            "_LORA_EMBED_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        done = program(env={**os.environ, **environment})
        assert done.stdout.split() == [expected]
