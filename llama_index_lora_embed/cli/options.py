"""Options that several commands have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from llama_index_lora_embed.cli.command import NOT_REACHED

if TYPE_CHECKING:
    from llama_index.core.llms import LLM as LlamaIndexLLM

    from llama_index_lora_embed.evaluation import Comparison

F = TypeVar("F", bound=Callable[..., Any])

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


def takes_launcher(function: F) -> F:
    """Give a function with a parameter `launcher` the options that make one in its place: those of `_launcher_of`."""

    def run(*arguments: Any, **values: Any) -> Any:
        return function(*arguments, launcher=_launcher_of(**{name: values.pop(name) for name in options}), **values)

    options = inspect.signature(_launcher_of, eval_str=True).parameters
    signature = inspect.signature(function, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "launcher"]
    more = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options.values()]
    run.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run  # type: ignore[return-value]


def _launcher_of(
    launcher: Annotated[
        Literal["torchrun", "accelerate", "ray"] | None,
        typer.Option(help="Train in several processes of this machine, or on the workers of a Ray cluster."),
    ] = None,
    num_workers: Annotated[
        int | None,
        typer.Option(help="With --launcher: processes, by default one for each GPU; or workers, by default 1."),
    ] = None,
    use_gpu: Annotated[bool, typer.Option("--use-gpu", help="With --launcher ray: one GPU for each worker.")] = False,
    storage_path: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="With --launcher ray: shared folder or URL (s3://bucket/runs) of checkpoints."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="With --launcher ray: the cluster. By default RAY_ADDRESS, or one on this machine."),
    ] = None,
    max_failures: Annotated[
        int | None, typer.Option(help="With --launcher: starts from the last checkpoint after a worker was lost.")
    ] = None,
) -> Any:
    """The `Launcher` that the options name; None without one.

    Raises:
        ConfigError: Options belong to another launcher.
        MissingExtraError: The extra "ray" is not installed.
    """
    from llama_index_lora_embed.core.errors import ConfigError

    of_ray = {"--use-gpu": use_gpu, "--storage-path": storage_path, "--address": address}
    of_any = {"--num-workers": num_workers is not None, "--max-failures": max_failures is not None}
    idle = [flag for flag, value in (of_ray if launcher != "ray" else {}).items() if value]
    idle += [flag for flag, value in (of_any if launcher is None else {}).items() if value]
    if idle:
        needed = "--launcher ray" if set(idle) & set(of_ray) else "--launcher torchrun, accelerate or ray"
        raise ConfigError(f"{', '.join(idle)} without {needed}", "options that fit together", f"Add {needed}.")
    if launcher is None:
        return None
    failures: dict[str, Any] = {} if max_failures is None else {"max_failures": max_failures}
    if launcher != "ray":
        from llama_index_lora_embed.engines.launcher import ProcessLauncher

        return ProcessLauncher(num_workers, launcher, **failures)
    from llama_index_lora_embed.distributed import RayLauncher

    workers = 1 if num_workers is None else num_workers
    return RayLauncher(workers, use_gpu, storage_path=storage_path, address=address, show=print, **failures)
