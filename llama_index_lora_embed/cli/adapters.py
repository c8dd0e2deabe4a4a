"""`adapters`: the registry of versions, and adapters merged into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llama_index_lora_embed.cli.command import NOT_REACHED, Outcome, command, table_text
from llama_index_lora_embed.cli.options import TOLERANCE

REGISTRY = Annotated[Path, typer.Option(help="Folder of the registry.")]
NAME = Annotated[str, typer.Argument(help="Name of the version.")]
DEFAULT = Path("runs/registry")


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(help="Registered versions, and which is promoted; merging.", no_args_is_help=True)
    app.add_typer(group, name="adapters")
    command(group, "lora-embed adapters add runs/handbook --data val.json")(add)
    command(group, "lora-embed adapters list", "lora-embed adapters list --json", name="list")(list_versions)
    command(group, "lora-embed adapters show v1")(show)
    command(group, "lora-embed adapters promote v2")(promote)
    command(group, "lora-embed adapters rollback")(rollback)
    command(
        group,
        "lora-embed adapters merge runs/both runs/handbook runs/previous",
        "lora-embed adapters merge runs/both runs/handbook runs/previous --weights 0.6 --weights 0.2",
    )(merge)


def add(
    path: Annotated[Path, typer.Argument(help="Adapter directory.")],
    data: Annotated[
        Path | None, typer.Option(help="Evaluation dataset; take the same one for all versions, to compare them.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the version. By default v1, v2, ...")] = None,
    registry: REGISTRY = DEFAULT,
) -> Outcome:
    """Register the adapter in a directory as a new version, and evaluate it."""
    from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
    from llama_index_lora_embed.deployment import RunRegistry

    dataset = None if data is None else EmbeddingQAFinetuneDataset.from_json(data)
    version = RunRegistry(registry).add(path, dataset=dataset, name=name)
    return Outcome(version, f"{version.name}: {version.path}")


def list_versions(registry: REGISTRY = DEFAULT) -> Outcome:
    """List all versions with their metrics."""
    from llama_index_lora_embed.deployment import RunRegistry

    found = RunRegistry(registry)
    promoted = found.promoted()
    versions = found.list()
    value = {"promoted": None if promoted is None else promoted.name, "versions": versions}
    return Outcome(value, table_text(found.table()) if versions else "no versions yet")


def show(name: NAME, registry: REGISTRY = DEFAULT) -> Outcome:
    """Show one version: its model, training set, metrics, and whether its directory still holds it."""
    from llama_index_lora_embed.deployment import RunRegistry

    found = RunRegistry(registry)
    text = found.show(name)
    return Outcome(next(version for version in found.list() if version.name == name), text)


def promote(
    name: NAME,
    gate: Annotated[
        bool, typer.Option(help="Promote only what is no worse than the promoted version on the same queries.")
    ] = True,
    tolerance: TOLERANCE = 0.01,
    registry: REGISTRY = DEFAULT,
) -> Outcome:
    """Put a version into use; exit code 3 says that it did not pass the gate."""
    from llama_index_lora_embed.deployment import RunRegistry

    found = RunRegistry(registry)
    passed = found.gate(name, tolerance=tolerance) if gate else None
    if passed is not None and not passed:
        return Outcome(passed, str(passed), NOT_REACHED)
    found.promote(name)
    return Outcome({"promoted": name, "gate": passed}, f"promoted: {name}" + (f"\n{passed}" if passed else ""))


def rollback(registry: REGISTRY = DEFAULT) -> Outcome:
    """Promote the version that was promoted before; a second call undoes the first."""
    from llama_index_lora_embed.deployment import RunRegistry

    version = RunRegistry(registry).roll_back()
    return Outcome({"promoted": version.name}, f"promoted: {version.name}")


def merge(
    output: Annotated[Path, typer.Argument(help="Adapter directory to write.")],
    adapters: Annotated[list[str], typer.Argument(help="Adapters of one base: folders or ids on the Hub.")],
    weights: Annotated[list[float] | None, typer.Option(help="Weight of each adapter, in their order.")] = None,
    combination: Annotated[
        Literal["linear", "ties", "dare_linear", "dare_ties"], typer.Option(help="How weight changes are combined.")
    ] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of a weight change that is kept.")] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of the result.")] = None,
    base: Annotated[str | None, typer.Option(help="Their base, if it has moved.")] = None,
) -> Outcome:
    """Merge several adapters of one base into one adapter."""
    from llama_index_lora_embed.deployment import merge_adapters

    merged = merge_adapters(
        adapters,
        output,
        weights=weights or None,
        combination=combination,
        density=density,
        rank=rank,
        base_model=base,
    )
    return Outcome(merged, str(merged))
