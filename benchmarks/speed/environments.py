"""Virtual environments for contenders that cannot be installed beside this package; the first run creates them.

Each is a folder below `--envs` with its own torch, transformers and sentence-transformers, in the versions of the
repository's `constraints.txt`, so that contenders differ in their own code and not in their libraries. The two
environments take 1.9 GB and 1.7 GB with a CPU build of torch, the one for plots 0.2 GB. If pip's index only has CUDA
builds of torch (PyPI, on Linux), they take several times as much: set `PIP_EXTRA_INDEX_URL` to
https://download.pytorch.org/whl/cpu for the first run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
# mistralai 2 broke llama-index-finetuning's imports; sentence-transformers evaluates khoji, which does not install it
REQUIREMENTS = {
    "llama-index-finetuning": [
        *("torch", "llama-index-finetuning==0.4.2", "mistralai<2", "sentence-transformers[train]"),
        "llama-index-embeddings-huggingface",
    ],
    "khoji": ["torch", "khoji==0.4.0", "sentence-transformers"],
    "plot": ["matplotlib>=3.9"],
}


def pinned(requirement: str, constraints: str) -> str:
    """The requirement with its version in the constraints, if it does not name one."""
    for line in constraints.splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        if version and name == requirement:
            return f"{name}=={version}"
    return requirement


def python_of(name: str, envs: Path) -> str:
    """The interpreter of an environment, which is created if it is missing or its requirements have changed.

    Raises:
        subprocess.CalledProcessError: The installation failed.
    """
    folder = envs / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    constraints = CONSTRAINTS.read_text(encoding="utf-8")
    wanted = [pinned(requirement, constraints) for requirement in REQUIREMENTS[name]]
    marker = folder / "installed.txt"
    known = "\n".join([*wanted, constraints])
    if marker.exists() and marker.read_text(encoding="utf-8") == known:
        return str(python)
    print(f"creating the environment {name!r} in {folder}: {', '.join(wanted)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", str(CONSTRAINTS), *wanted], check=True)
    marker.write_text(known, encoding="utf-8")  # written last, so that a broken installation is repeated
    return str(python)
