"""A cluster whose machine has another version of the package, or none, and the calls that send work there.

As a program: ADDRESS MODEL FOLDER. It prints, as JSON, the error that each call raises.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_index_lora_embed
from tests.helpers.service_processes import free_port, until


def python_with(version: str | None, folder: Path) -> Path:
    """The Python of a new environment with everything that this one has but the package, or with a version of it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "lora_embed" not in path.name:
            (packages / path.name).symlink_to(path)
    if version is not None:
        package = Path(llama_index_lora_embed.__file__).parent
        copy = shutil.copytree(package, packages / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        init = (copy / "__init__.py").read_text()
        (copy / "__init__.py").write_text(init.replace(llama_index_lora_embed.__version__, version))
    return folder / "bin" / "python"


@contextmanager
def cluster_of(python: Path) -> Iterator[str]:
    """The address of a cluster of one node with two CPUs, whose workers run by this Python."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="ray-")  # sockets lie there, whose paths must be short
    options = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", f"--temp-dir={folder}"]
    options += ["--include-dashboard=false", "--object-store-memory=100000000", "--block"]
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    command = [str(python), "-m", "ray.scripts.scripts", "start", *options]
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as node:
        try:
            until(lambda: "Ray runtime started" in node.stdout.readline(), 120, "a cluster")
            yield f"127.0.0.1:{port}"
        finally:
            node.terminate()
            node.wait()
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Make each call that sends work to the cluster."""
    from llama_index_lora_embed import run_finetune
    from llama_index_lora_embed.core.errors import ClusterError
    from llama_index_lora_embed.data import LLMQueryGenerator
    from llama_index_lora_embed.distributed import (
        RayLauncher,
        connect,
        embed_dataset,
        generate_queries,
        ray_transform,
    )
    from tests.helpers.killing import FailingEmbedding
    from tests.helpers.launched_training import tiny_config
    from tests.helpers.llms import FAST, FakeLLM

    address, model, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    config = tiny_config(model, folder)
    (folder / "nodes.jsonl").write_text('{"id": "a", "text": "a text"}\n')
    generator = LLMQueryGenerator(FakeLLM(), journal=folder / "journal.jsonl", settings=FAST)
    calls: dict[str, Callable[[], Any]] = {
        "embed_dataset": lambda: embed_dataset(folder / "nodes.jsonl", FailingEmbedding(), folder / "vectors"),
        "generate_queries": lambda: generate_queries(folder / "nodes.jsonl", folder / "queries", [generator]),
        "ray_transform": lambda: ray_transform(generator),
        "run_finetune": lambda: run_finetune(config, launcher=RayLauncher(1)),
    }
    connect(address)
    told = {}
    for name, call in calls.items():
        try:
            told[name] = f"no error: {call()}"
        except ClusterError as error:
            told[name] = str(error)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
