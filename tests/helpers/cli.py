"""The command line in this process, and a folder with everything that its examples name."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml
from llama_index.core.schema import TextNode
from typer.main import get_command
from typer.testing import CliRunner, Result

from llama_index_lora_embed import EmbeddingQAFinetuneDataset
from llama_index_lora_embed.cli.app import app
from llama_index_lora_embed.deployment import RunRegistry
from tests.conftest import make_dataset

PROGRAM = "lora-embed"


def lora_embed(line: str, **settings: Any) -> Result:
    """Run a command line, without the program's name."""
    return CliRunner().invoke(app, shlex.split(line.removeprefix(f"{PROGRAM} ")), prog_name=PROGRAM, **settings)


def result_of(line: str, code: int = 0, **settings: Any) -> Any:
    """The JSON object that a command prints; its exit code must be `code`."""
    done = lora_embed(f"{line} --json", **settings)
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def commands() -> dict[str, Any]:
    """Every command of the application by its words."""
    found = {}
    for name, command in get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {n}": c for n, c in inner.items()}
    return found


def examples() -> list[str]:
    """Every example of every help page."""
    lines = [line for command in commands().values() for line in (command.epilog or "").split("\n\n")]
    return [line for line in lines if line.startswith(PROGRAM)]


def furnish(folder: Path, base: str, adapter: Path, nodes: list[TextNode]) -> None:
    """What the examples name: a base, adapters, datasets, documents, a configuration."""
    shutil.copytree(base, folder / "base")
    for name in ("handbook", "previous"):
        shutil.copytree(adapter, folder / "runs" / name)
    make_dataset().save_json(folder / "train.json")
    make_dataset(passages=10, seed=7, prefix="v").save_json(folder / "val.json")
    rows = [f"w{i} w{i + 1},w{i} w{i + 2 + 50 * (i % 2)},{1 - i % 2}" for i in range(40)]
    (folder / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    (folder / "nodes.jsonl").write_text("\n".join(node.to_json() for node in nodes))
    (folder / "documents").mkdir()
    for node in nodes:
        (folder / "documents" / f"{node.node_id}.txt").write_text(node.text)
    (folder / "queries.txt").write_text("\n".join(" ".join(node.text.split()[:3]) for node in nodes))
    (folder / "texts.txt").write_text("\n".join(make_dataset(passages=40, seed=5).corpus.values()))
    EmbeddingQAFinetuneDataset(
        queries={node.node_id: " ".join(node.text.split()[-4:]) for node in nodes},
        corpus={node.node_id: node.text for node in nodes},
        relevant_docs={node.node_id: [node.node_id] for node in nodes},
        query_origins={node.node_id: "human" for node in nodes},
    ).save_json(folder / "nodes_val.json")
    registry = RunRegistry(folder / "runs" / "registry")
    for name in ("handbook", "previous"):
        version = registry.add(folder / "runs" / name, dataset=make_dataset(passages=10, seed=7, prefix="v"))
        registry.promote(version.name)
    config = {
        "data": {"dataset": "train.json", "val_dataset": "val.json"},
        "base": {"model_id": "base"},
        "training": {"epochs": 8, "batch_size": 8, "learning_rate": 5e-3, "device": "cpu"},
        "output": {"model_output_path": "runs/new"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
