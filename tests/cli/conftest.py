"""A working directory with everything that the examples of the help pages name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import make_nodes
from tests.helpers.cli import furnish


@pytest.fixture(scope="session")
def furnished(tiny_model, adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("furnished")
    furnish(folder, tiny_model, adapter, make_nodes())
    return folder


@pytest.fixture
def workplace(furnished, tmp_path, monkeypatch) -> Path:
    """The working directory of the test."""
    folder = tmp_path / "work"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLAMA_INDEX_CACHE_DIR", str(tmp_path / "llama_index"))
    return folder
