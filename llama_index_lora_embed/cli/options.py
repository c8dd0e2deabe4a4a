"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llama_index_lora_embed.cli.command import NOT_REACHED

if TYPE_CHECKING:
    from llama_index.core.llms import LLM as LlamaIndexLLM

    from llama_index_lora_embed.engines.launcher import Launcher
    from llama_index_lora_embed.evaluation import Comparison

Requirement = Literal["better", "no-worse"]
_REQUIRE = "Exit with 3 unless the verdict is BETTER; or, for no-worse, if more than 0.01 of nDCG@10 may be lost."
_BASE = "Model to compare with: folder or id on the Hub. By default the adapter's own base."
REQUIRE = Annotated[Requirement | None, typer.Option(help=_REQUIRE)]
MODEL = Annotated[str, typer.Argument(help="Adapter, export or base: folder or id on the Hub.")]
DATA = Annotated[Path, typer.Argument(help="Dataset file: queries and passages, or labelled pairs.")]
KIND = Annotated[Literal["queries", "pairs"], typer.Option(help="What the dataset holds.")]
BASE = Annotated[str | None, typer.Option(help=_BASE)]
DEVICE = Annotated[str | None, typer.Option(help="torch device, such as cpu or cuda:0. By default the fastest.")]
CACHE = Annotated[Path | None, typer.Option(help="Folder in which vectors are kept for the next evaluation.")]
TEXTS = Annotated[Path, typer.Argument(help="Text file, dataset, nodes, folder of documents, or table of texts.")]
TOLERANCE = Annotated[float, typer.Option(help="Accepted loss of nDCG@10, 0 to 1.")]
KEEP = Annotated[int, typer.Option(help="Versions to keep.")]
LLM = Annotated[
    str | None,
    typer.Option(metavar="MODULE:CLASS", help="LLM that writes queries, such as llama_index.llms.ollama:Ollama."),
]
LLM_OPTIONS = Annotated[str | None, typer.Option(metavar="YAML", help="Its arguments, such as '{model: llama3.2}'.")]
NODES = Annotated[Path, typer.Argument(help="Folder of documents, or JSONL file of LlamaIndex nodes.")]

LAUNCHER = Annotated[
    Literal["torchrun", "accelerate", "ray"] | None,
    typer.Option(help="Train in several processes of this machine, or on the workers of a Ray cluster."),
]
NUM_WORKERS = Annotated[
    int | None, typer.Option(help="With --launcher: processes, by default one for each GPU; or workers, by default 1.")
]
USE_GPU = Annotated[bool, typer.Option("--use-gpu", help="With --launcher ray: one GPU for each worker.")]
STORAGE = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="With --launcher ray: shared folder or URL (s3://bucket/runs) of checkpoints."),
]
ADDRESS = Annotated[
    str | None, typer.Option(help="With --launcher ray: the cluster. By default RAY_ADDRESS, or one on this machine.")
]
MAX_FAILURES = Annotated[
    int | None, typer.Option(help="With --launcher: starts from the last checkpoint after a worker was lost.")
]


def exit_code(comparison: Comparison | None, require: Requirement | None) -> tuple[int, tuple[str, ...]]:
    """The exit code for a verdict, and lines for stderr; without a comparison no requirement is met."""
    if require is None or (comparison is not None and comparison.meets(require)):
        return 0, ()
    return NOT_REACHED, (f"the verdict is below --require {require}",)


def llm_of(name: str | None, options: str | None) -> LlamaIndexLLM | None:
    """The LLM that `--llm` and `--llm-options` name; None without one.

    Raises:
        ConfigError: It cannot be made.
    """
    if name is None:
        return None
    from llama_index_lora_embed.config.files import parse_yaml_mapping
    from llama_index_lora_embed.data.llm.by_name import load_llm

    return load_llm(name, None if options is None else parse_yaml_mapping(options, "--llm-options"))


def launcher_of(
    name: Literal["torchrun", "accelerate", "ray"] | None,
    num_workers: int | None,
    use_gpu: bool,
    storage_path: str | None,
    address: str | None,
    max_failures: int | None,
) -> Launcher | None:
    """The launcher that the options name; None without one.

    Raises:
        ConfigError: Options belong to another launcher.
        MissingExtraError: The extra "ray" is not installed.
    """
    from llama_index_lora_embed.core.errors import ConfigError

    of_ray = {"--use-gpu": use_gpu, "--storage-path": storage_path, "--address": address}
    of_any = {"--num-workers": num_workers is not None, "--max-failures": max_failures is not None}
    idle = [flag for flag, value in (of_ray if name != "ray" else {}).items() if value]
    idle += [flag for flag, value in (of_any if name is None else {}).items() if value]
    if idle:
        needed = "--launcher ray" if set(idle) & set(of_ray) else "--launcher torchrun, accelerate or ray"
        raise ConfigError(f"{', '.join(idle)} without {needed}", "options that fit together", f"Add {needed}.")
    failures: dict[str, Any] = {} if max_failures is None else {"max_failures": max_failures}
    if name is None:
        return None
    if name != "ray":
        from llama_index_lora_embed.engines.launcher import ProcessLauncher

        return ProcessLauncher(num_workers, name, **failures)
    from llama_index_lora_embed.distributed import RayLauncher

    workers = 1 if num_workers is None else num_workers
    return RayLauncher(workers, use_gpu, storage_path=storage_path, address=address, show=print, **failures)
