"""`embed`, `export` and `reindex`: what is done with a model after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llama_index_lora_embed.cli.command import NOT_REACHED, Outcome, command, lines
from llama_index_lora_embed.cli.options import DEVICE, KEEP, MODEL, NODES, TEXTS, TOLERANCE

_TEXTS = "A sample of the texts to embed, 20 or more: text file, dataset, nodes, folder of documents or table."
_BEFORE = "Model of the index in use; with --data, to compare the two."


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(
        app,
        "lora-embed embed runs/handbook texts.txt --output vectors.npy",
        "lora-embed embed runs/handbook queries.txt --queries",
    )(embed)
    command(
        app,
        "lora-embed export runs/handbook runs/merged --texts texts.txt",
        "lora-embed export runs/handbook runs/onnx --texts texts.txt --backend onnx",
    )(export)
    command(
        app,
        "lora-embed reindex runs/index nodes.jsonl runs/handbook",
        "lora-embed reindex runs/index nodes.jsonl runs/handbook --data nodes_val.json --before runs/previous",
    )(reindex)


def embed(
    model: MODEL,
    texts: TEXTS,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".npy or .jsonl file. By default JSON lines on stdout.")
    ] = None,
    queries: Annotated[bool, typer.Option("--queries", help="The texts are queries, not passages.")] = False,
    column: Annotated[str | None, typer.Option(help="Column of the texts in a table.")] = None,
    device: DEVICE = None,
) -> Outcome:
    """Embed texts."""
    from llama_index_lora_embed.data.readers.texts import read_texts
    from llama_index_lora_embed.deployment.embed import as_json_lines, embed_texts, write_vectors
    from llama_index_lora_embed.embedding.open_embedding import open_embedding

    found = read_texts(texts, column)
    embed_model = open_embedding(model, device=device)
    vectors = embed_texts(embed_model, found, queries=queries)
    value = {"model": embed_model.model_name, "texts": len(found), "dimensions": vectors.shape[1]}
    if output is None:
        return Outcome({**value, "embeddings": vectors}, "\n".join(as_json_lines(found, vectors)))
    written = write_vectors(output, found, vectors)
    return Outcome({**value, "output": written}, f"{vectors.shape[0]} vectors of {vectors.shape[1]} numbers: {written}")


def export(
    model: MODEL,
    path: Annotated[Path, typer.Argument(help="Folder to write.")],
    texts: Annotated[Path, typer.Option(help=_TEXTS)],
    queries: Annotated[Path | None, typer.Option(help="A sample of the queries. By default the first texts.")] = None,
    backend: Annotated[
        Literal["merged", "onnx", "openvino"],
        typer.Option(help="merged: the full model as safetensors, for TEI, vLLM, Infinity and llama.cpp's converter."),
    ] = "merged",
    precision: Annotated[Literal["fp32", "int8"], typer.Option(help="int8 only for onnx and openvino.")] = "fp32",
    min_cosine: Annotated[float | None, typer.Option(help="Least median cosine of both models' vectors.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Least share of nearest texts in common.")] = None,
) -> Outcome:
    """Write a model for other servers and backends, and certify that its vectors and rankings are the same."""
    from llama_index_lora_embed.data.readers.texts import read_texts
    from llama_index_lora_embed.embedding.export import export_model
    from llama_index_lora_embed.embedding.open_embedding import open_lora_embedding

    certificate = export_model(
        open_lora_embedding(model),
        path,
        texts=read_texts(texts),
        queries=None if queries is None else read_texts(queries),
        backend=backend,
        precision=precision,
        min_cosine=min_cosine,
        min_agreement=min_agreement,
    )
    return Outcome({"path": path, "certificate": certificate}, lines(str(certificate), f"written: {path}"))


def reindex(
    store: Annotated[Path, typer.Argument(help="Folder of the index; it is made if it is not there.")],
    nodes: NODES,
    model: MODEL,
    data: Annotated[
        Path | None, typer.Option(help="Dataset about these nodes: the new index is used only if it is no worse.")
    ] = None,
    before: Annotated[str | None, typer.Option(help=_BEFORE)] = None,
    tolerance: TOLERANCE = 0.01,
    keep: KEEP = 2,
    device: DEVICE = None,
) -> Outcome:
    """Build an index with a new model beside the one in use, compare both, and switch if the new one is no worse.

    Exit code 3 says that the new index was refused; the old one stays in use.
    """
    from llama_index_lora_embed.data.dataset import EmbeddingQAFinetuneDataset
    from llama_index_lora_embed.data.readers.nodes import read_nodes
    from llama_index_lora_embed.deployment import reindex as replace_index
    from llama_index_lora_embed.embedding.open_embedding import open_embedding

    dataset = None if data is None else EmbeddingQAFinetuneDataset.from_json(data)
    done = replace_index(
        store,
        read_nodes(nodes),
        open_embedding(model, device=device),
        dataset=dataset,
        before=None if before is None else open_embedding(before, device=device),
        tolerance=tolerance,
        keep=keep,
    )
    return Outcome(done, str(done), 0 if done.switched else NOT_REACHED)
