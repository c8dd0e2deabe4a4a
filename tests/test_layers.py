"""The layers in pyproject.toml are kept, and an import that goes up is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lint_imports(project: Path) -> subprocess.CompletedProcess[str]:
    """Run the project's contracts on the package that lies in `project`."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--config", str(project / "pyproject.toml")]
    env = {**os.environ, "PYTHONPATH": str(project), "COLUMNS": "200"}
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llama_index_lora_embed", tmp_path / "llama_index_lora_embed", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_package_keeps_its_layers(project):
    done = lint_imports(project)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "forbidden"),
    [
        ("data/split.py", "llama_index_lora_embed.engines"),
        ("engines/run.py", "llama_index_lora_embed.distributed"),
        ("core/files.py", "llama_index_lora_embed.config"),
        ("embedding/lora_embedding.py", "llama_index_lora_embed.training.lora"),
    ],
)
def test_an_import_that_goes_up_or_across_breaks_the_layers(project, file, forbidden):
    path = project / "llama_index_lora_embed" / file
    path.write_text(path.read_text(encoding="utf-8") + f"\nimport {forbidden}\n", encoding="utf-8")
    done = lint_imports(project)
    importer = "llama_index_lora_embed." + file.removesuffix(".py").replace("/", ".")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{importer} -> {forbidden}" in " ".join(done.stdout.split())
