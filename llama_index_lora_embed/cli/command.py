"""What all commands share: output, errors, exit codes, and examples on the help page."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import typer

from llama_index_lora_embed.core.errors import LoraEmbedError
from llama_index_lora_embed.core.plain import plain

if TYPE_CHECKING:
    from llama_index_lora_embed.evaluation import Table

ERROR, NOT_REACHED, INTERRUPTED = 1, 3, 130
"""Exit codes: 0 is as asked, 2 a wrong usage (Click's)."""

MARKUP: Literal["rich"] | None = "rich" if shutil.get_terminal_size().columns >= 60 else None
"""Of help pages: rich's tables would cut the names of flags in a narrow terminal."""
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object, and everything else to stderr.")]
DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        value: For `--json`: anything that `plain` takes.
        text: For people.
        code: Exit code.
        notes: Lines for stderr.
    """

    value: Any
    text: str
    code: int = 0
    notes: tuple[str, ...] = ()


class InterruptedWithHint(KeyboardInterrupt):
    """Ctrl-C, with a sentence on how to go on."""


def command(app: typer.Typer, *examples: str, name: str | None = None) -> Callable[[Callable[..., Outcome]], Any]:
    """Register a function that returns an `Outcome` as a command with the options `--json` and `--debug`.

    Args:
        app: The group of commands.
        examples: Command lines for the end of the help page.
        name: Of the command; None for that of the function.
    """

    def register(function: Callable[..., Outcome]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            as_json, debug = values.pop("as_json"), values.pop("debug")
            with errors_told(debug), only_results_on_stdout() as stdout:
                outcome = function(**values)
                for note in outcome.notes:
                    print(note, file=sys.stderr)
                shown = json.dumps(plain(outcome.value), indent=2) if as_json else outcome.text
                if shown:
                    print(shown, file=stdout, flush=True)
            raise typer.Exit(outcome.code)

        signature = inspect.signature(function, eval_str=True)
        more = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for key, kind in (("as_json", JSON), ("debug", DEBUG))
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
        run.__signature__ = signature.replace(parameters=[*parameters, *more], return_annotation=None)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*parameters, *more)}
        page = "\n\n".join(["Examples:", *examples]) if examples else None
        app.command(name, epilog=page, help=inspect.getdoc(function))(run)
        return run

    return register


@contextlib.contextmanager
def errors_told(debug: bool) -> Iterator[None]:
    """Tell errors on stderr without a traceback, and end with the exit code that is theirs."""
    try:
        yield
    except KeyboardInterrupt as error:
        hint = f" {error}" if isinstance(error, InterruptedWithHint) else ""
        print(f"interrupted.{hint}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except LoraEmbedError as error:
        told = f"error: {error}"
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]  # nor at exit
        raise typer.Exit(ERROR) from None
    except (OSError, UnicodeError, MemoryError) as error:
        told = f"error: {error or type(error).__name__}"
    except Exception as error:
        told = f"error: {type(error).__name__}: {error}\nThis is unexpected; --debug shows where it happened."
    else:
        return
    if debug:
        traceback.print_exc()
    print(told, file=sys.stderr)
    raise typer.Exit(ERROR)


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[IO[str]]:
    """Send to stderr whatever is printed within, and warnings as one line each; yields the real stdout."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield stdout


def lines(*parts: str | Sequence[str]) -> str:
    """Texts under one another, without empty ones."""
    flat = [line for part in parts for line in ([part] if isinstance(part, str) else part)]
    return "\n".join(line for line in flat if line)


def table_text(table: Table) -> str:
    """A table as wide as the terminal, or as its cells where there is none."""
    from rich.console import Console

    console = Console(width=None if sys.__stdout__ is not None and sys.__stdout__.isatty() else 200)
    with console.capture() as captured:
        console.print(table.to_rich())
    return captured.get().rstrip()
