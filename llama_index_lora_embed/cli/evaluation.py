"""`eval`, `compare` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_index_lora_embed.cli.command import Outcome, command, lines
from llama_index_lora_embed.cli.options import BASE, CACHE, DATA, DEVICE, KIND, MODEL, REQUIRE, exit_code

if TYPE_CHECKING:
    from llama_index_lora_embed.evaluation import PairEvaluation, RetrievalComparison

REGRESSION = Annotated[
    Path | None, typer.Option(help="Dataset of general queries, on which the tuned model must not lose more than 0.02.")
]
OUTPUT = Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(
        app,
        "lora-embed eval runs/handbook val.json",
        "lora-embed eval base val.json --json",
        "lora-embed eval runs/handbook pairs.csv --kind pairs",
        name="eval",
    )(evaluate)
    command(
        app,
        "lora-embed compare runs/handbook val.json",
        "lora-embed compare runs/handbook val.json --base runs/previous --require no-worse",
    )(compare)
    command(app, "lora-embed report runs/handbook val.json --output report.html")(report)


def evaluate(
    model: MODEL,
    data: DATA,
    kind: KIND = "queries",
    base: Annotated[str | None, typer.Option(help="Base of an adapter, if it has moved.")] = None,
    device: DEVICE = None,
    cache_folder: CACHE = None,
) -> Outcome:
    """Evaluate one model: metrics of retrieval, or of labelled pairs."""
    from llama_index_lora_embed.data.training_data import read_training_data
    from llama_index_lora_embed.embedding.open_embedding import open_embedding
    from llama_index_lora_embed.evaluation.models import evaluate_model

    dataset = read_training_data(data, kind)
    found = evaluate_model(open_embedding(model, base_model=base, device=device), dataset, cache_folder=cache_folder)
    return Outcome(found, str(found))


def compare(
    tuned: MODEL,
    data: DATA,
    base: BASE = None,
    kind: KIND = "queries",
    regression_set: REGRESSION = None,
    require: REQUIRE = None,
    device: DEVICE = None,
    cache_folder: CACHE = None,
) -> Outcome:
    """Compare a tuned model with its base, or with another model, and give a verdict."""
    from llama_index_lora_embed.evaluation.models import comparison_of, evaluations_of

    found = _compared(tuned, data, base, kind, regression_set, device, cache_folder)
    comparison = comparison_of(found)
    text = lines(
        str(comparison if isinstance(found, tuple) else found),
        *(f"{name}: {evaluation}" for name, evaluation in evaluations_of(found).items()),
    )
    return Outcome(comparison if isinstance(found, tuple) else found, text, *exit_code(comparison, require))


def report(
    tuned: MODEL,
    data: DATA,
    output: OUTPUT = Path("report.html"),
    base: BASE = None,
    kind: KIND = "queries",
    figures: Annotated[Path | None, typer.Option(help="Folder for the pictures as PNG files.")] = None,
    regression_set: REGRESSION = None,
    device: DEVICE = None,
    cache_folder: CACHE = None,
) -> Outcome:
    """Compare a tuned model with its base, and write one page with the verdict and the evidence for it."""
    from llama_index_lora_embed.evaluation import RunFacts, write_report
    from llama_index_lora_embed.evaluation.models import comparison_of

    found = _compared(tuned, data, base, kind, regression_set, device, cache_folder)
    page = write_report(output, found, run=RunFacts.find(tuned), figures=figures)
    comparison = comparison_of(found)
    return Outcome({"report": page, "comparison": comparison}, lines(str(comparison), f"report: {page}"))


def _compared(
    tuned: str,
    data: Path,
    base: str | None,
    kind: Any,
    regression_set: Path | None,
    device: str | None,
    cache_folder: Path | None,
) -> RetrievalComparison | tuple[PairEvaluation, PairEvaluation]:
    from llama_index_lora_embed.data.training_data import read_training_data
    from llama_index_lora_embed.embedding.open_embedding import open_base, open_embedding
    from llama_index_lora_embed.evaluation.models import compare_models

    dataset = read_training_data(data, kind)
    general = None if regression_set is None else read_training_data(regression_set, "queries")
    before = open_base(tuned, device=device) if base is None else open_embedding(base, device=device)
    after = open_embedding(tuned, device=device)
    return compare_models(before, after, dataset, regression_set=general, cache_folder=cache_folder)
