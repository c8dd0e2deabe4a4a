"""`generate` and `label`: data to train on and to evaluate with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_index_lora_embed.cli.command import Outcome, command, lines
from llama_index_lora_embed.cli.flags import takes_config
from llama_index_lora_embed.cli.options import DEVICE, LLM, LLM_OPTIONS, NODES, llm_of
from llama_index_lora_embed.config import FinetuneConfig

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

OUTPUT = Annotated[Path, typer.Option("--output", "-o", help="Dataset file to write.")]
_VAL = "Dataset file for the queries that are held out by source document (--val-fraction)."


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(
        app,
        "lora-embed generate --nodes documents --model-id base --output generated.json",
        "lora-embed generate --nodes nodes.jsonl --model-id base --output generated.json --val-output held_out.json",
    )(generate)
    command(app, "lora-embed label queries.txt nodes.jsonl --model base --model runs/handbook --output labelled.json")(
        label
    )


@takes_config("data", "base")
def generate(
    config: FinetuneConfig,
    *,
    output: OUTPUT = Path("dataset.json"),
    val_output: Annotated[Path | None, typer.Option(help=_VAL)] = None,
    llm: LLM = None,
    llm_options: LLM_OPTIONS = None,
) -> Outcome:
    """Generate queries for the passages of nodes: with an LLM, or from titles, first sentences and definitions."""
    from llama_index_lora_embed.engines.generate import generate_dataset

    found = generate_dataset(
        config, llm=llm_of(llm, llm_options), journal=f"{output}.journal.jsonl", split=val_output is not None
    )
    found.dataset.save_json(output)
    if val_output is not None and found.val_dataset is not None:
        found.val_dataset.save_json(val_output)
    value = {"output": output, "val_output": val_output, "report": found.report, "data": found.dataset.summary()}
    return Outcome(
        value, lines(str(found.report), f"written: {output}", f"held out: {val_output}" if val_output else "")
    )


def label(
    queries: Annotated[Path, typer.Argument(help="Text file with a query in each line, or a table with queries.")],
    nodes: NODES,
    model: Annotated[list[str], typer.Option(help="Whose best passages are graded; repeat it for several models.")],
    output: OUTPUT = Path("labelled.json"),
    answers: Annotated[
        Path | None,
        typer.Option(help="File of answers, which a later call continues. By default beside the output."),
    ] = None,
    max_queries: Annotated[int, typer.Option(min=1, help="Queries to label, a random sample.")] = 20,
    top_k: Annotated[int, typer.Option(min=1, help="Passages of each model and of BM25.")] = 5,
    column: Annotated[str | None, typer.Option(help="Column of the queries in a table.")] = None,
    device: DEVICE = None,
) -> Outcome:
    """Grade in the terminal what models find for real queries: a validation set whose verdict can be BETTER.

    Type 0 to 3 for a grade, s to skip, u to undo, q to quit, each followed by Enter.
    """
    from llama_index_lora_embed.data.readers.nodes import read_nodes
    from llama_index_lora_embed.embedding.open_embedding import open_embedding
    from llama_index_lora_embed.evaluation import label_queries

    models: dict[str, BaseEmbedding] = {place: open_embedding(place, device=device) for place in model}
    found = label_queries(
        str(queries),
        read_nodes(nodes),
        models,
        answers or f"{output}.answers.jsonl",
        max_queries=max_queries,
        top_k=top_k,
        column=column,
    )
    found.dataset.save_json(output)
    return Outcome({"output": output, "report": found.report}, f"written: {output}")
