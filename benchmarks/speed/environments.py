"""Virtual environments of contenders that do not go with this package's own, made on the first run.

Each is a folder below `--envs` with torch, transformers and sentence-transformers of its own, in the versions of the
repository's `constraints.txt`, so that contenders differ in their own code and not in the libraries below. The
two take 1.9 GB and 1.7 GB with a CPU build of torch, the one for plots 0.2 GB. Where pip's index has CUDA builds of
torch only (PyPI, on Linux), they take several times that: point pip at https://download.pytorch.org/whl/cpu with
`PIP_EXTRA_INDEX_URL` for the first run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
# mistralai 2 broke llama-index-finetuning's imports; khoji has no sentence-transformers, which judges it here
REQUIREMENTS = {
    "llama-index-finetuning": ["torch", "llama-index-finetuning==0.4.2", "mistralai<2", "sentence-transformers[train]"],
    "khoji": ["torch", "khoji==0.4.0", "sentence-transformers"],
    "plot": ["matplotlib>=3.9"],
}


def pinned(requirement: str, constraints: str) -> str:
    """The requirement with the version that the constraints have for it, if it has none of its own."""
    for line in constraints.splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        if version and name == requirement:
            return f"{name}=={version}"
    return requirement


def python_of(name: str, envs: Path) -> str:
    """The interpreter of an environment, which is made if it is not there or its requirements have changed.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    folder = envs / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    constraints = CONSTRAINTS.read_text(encoding="utf-8")
    wanted = [pinned(requirement, constraints) for requirement in REQUIREMENTS[name]]
    marker = folder / "installed.txt"
    known = "\n".join([*wanted, constraints])
    if marker.exists() and marker.read_text(encoding="utf-8") == known:
        return str(python)
    print(f"making the environment {name!r} in {folder}: {', '.join(wanted)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", str(CONSTRAINTS), *wanted], check=True)
    marker.write_text(known, encoding="utf-8")  # last, so that a broken installation is made again
    return str(python)
