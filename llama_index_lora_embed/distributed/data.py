"""Queries and vectors of more nodes than one machine or its memory holds, by Ray Data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import MetadataMode

from llama_index_lora_embed.core.errors import (
    AdapterError,
    BaseModelMismatchError,
    ConfigError,
    JournalError,
    LLMError,
    MissingExtraError,
    ModelNotFoundError,
)
from llama_index_lora_embed.core.files import absolute
from llama_index_lora_embed.data.build import check_arguments, default_query_generators
from llama_index_lora_embed.data.questions.base import QueryGenerator, attach_queries, embed_text
from llama_index_lora_embed.data.readers.parts import Part, Row, Source
from llama_index_lora_embed.distributed.journal import llm_generators, shared_journals, use_journals
from llama_index_lora_embed.distributed.parts import Output
from llama_index_lora_embed.distributed.run import PartsReport, Run

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding

_PART_BYTES = 1 << 20
# what every node would meet, so that the run ends
FATAL = (
    AdapterError, BaseModelMismatchError, JournalError, LLMError, MissingExtraError, ModelNotFoundError, MemoryError,
)  # fmt: skip


def embed_dataset(
    source: Source,
    embed_model: BaseEmbedding | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    vector_store: Any | None = None,
    num_workers: int = 1,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    id_column: str | None = None,
    text_column: str | None = None,
    part_bytes: int = _PART_BYTES,
    show_progress: bool = False,
) -> PartsReport:
    """Embed the nodes of JSONL or Parquet files on a Ray cluster, and write them with their vectors as Parquet.

    The vectors are those of `embed_model.get_text_embedding_batch`, in the order of the input. A worker that dies is
    started again and repeats its part; a node that cannot be embedded has an error instead of a vector, and the run
    goes on. A call that was interrupted goes on where it stopped when it is repeated. Without a connection to a
    cluster, one is started on this machine (`connect`).

    The base's weights are memory-mapped from its safetensors files, so that the workers of a machine share them. The
    layers that an adapter changes are each worker's own; export the model with its adapter (`LoraEmbedding.export`,
    backend "merged") to share these, too.

    Args:
        source: A `.jsonl` or `.parquet` file, a folder of them, or several, on disk or any file system of fsspec. A row
            is a LlamaIndex node (`node.to_json()`), or has an id and a text; other columns become metadata that is not
            embedded. The output of `generate_queries` is such a folder.
        embed_model: Any LlamaIndex embedding model that can be pickled, or the folder of an adapter.
        output: Folder of the Parquet files (columns id, text, node, embedding, queries, error); seen by all nodes of
            the cluster.
        vector_store: A LlamaIndex vector store of this process, to whose `add` all nodes go with their vectors, in
            order. Stamp the index afterwards (`deployment.stamp_index`).
        num_workers: Copies of the model, each in a process of its own.
        cpus_per_worker: Processors of each, and the threads of its model. A worker with several computes a forward
            pass on each with one copy of the weights.
        gpus_per_worker: GPUs of each.
        id_column: Of tables; None for "id", "_id" or "node_id".
        text_column: Of tables; None for "text", "passage" or "content".
        part_bytes: Bytes of the input that are one unit of work and one file. A worker that dies loses as much.
        show_progress: Show Ray Data's progress bars.

    Raises:
        ConfigError: Arguments are wrong, or the model cannot be pickled.
        ClusterError: The cluster is missing, too small, or without this package; or workers died again and again.
        DatasetError: The source does not exist, or not one of its rows could be embedded.
        OutputDirectoryError: The folder cannot be written by all, or holds the output of another run.
        ModelNotFoundError, AdapterError, BaseModelMismatchError: The workers cannot load the model.
    """
    model: BaseEmbedding | _AdapterPath
    if isinstance(embed_model, (str, os.PathLike)):
        model, identity = _AdapterPath(absolute(embed_model)), absolute(embed_model)
    else:
        model, identity = embed_model, str(getattr(embed_model, "fingerprint", None) or embed_model.model_name)
    settings = {"embed_model": identity, "columns": [id_column, text_column]}
    run = Run(source, output, settings, num_workers, cpus_per_worker, gpus_per_worker, part_bytes, show_progress)
    parts = run.check(embed_model=model)
    threads = max(1, math.floor(cpus_per_worker)) if not gpus_per_worker else None
    return run.finish(_Embed(model, threads), parts, vector_store)


def generate_queries(
    source: Source,
    output: str | os.PathLike[str],
    generators: Iterable[QueryGenerator] | None = None,
    *,
    seed: int = 0,
    num_workers: int = 1,
    cpus_per_worker: float = 1,
    id_column: str | None = None,
    text_column: str | None = None,
    part_bytes: int = _PART_BYTES,
    show_progress: bool = False,
) -> PartsReport:
    """Run query generators over the nodes of JSONL or Parquet files on a Ray cluster.

    The output is the nodes as Parquet, with the queries in their metadata; `data.nodes` of a configuration, or
    `read_nodes`, takes its folder, and `MetadataQueryGenerator` ("metadata") reads the queries back:

        dataset, report = dataset_from_nodes(read_nodes("queries/"), [MetadataQueryGenerator()])

    Filters belong to that step, because they compare the queries of all nodes. A generator sees one part at a time:
    `NeighbourQueryGenerator` finds no neighbours across parts, and titles that many nodes share are left to filters.

    The journals of LLM generators are kept by one process on this machine, which writes the answers of all workers. An
    answer that was journalled is not asked for again: not when a worker died, nor when the call is repeated.

    Args:
        source: As for `embed_dataset`.
        output: Folder of the Parquet files; seen by all nodes of the cluster.
        generators: Query generators that can be pickled; None for `default_query_generators()`. Keys of APIs are sent
            to the workers with their LLMs. Limits of a run (`max_requests`, `max_tokens`) are refused, because no
            worker knows what the others asked.
        seed: Random seed of every generator.
        num_workers: Worker processes. Each sends as many requests at a time as its generators' settings allow.
        cpus_per_worker: Processors of each; generators that wait for an API need a fraction.
        id_column: As for `embed_dataset`.
        text_column: As for `embed_dataset`.
        part_bytes: As for `embed_dataset`.
        show_progress: Show Ray Data's progress bars.

    Raises:
        ConfigError: Arguments are wrong, or a generator cannot be pickled.
        ClusterError: As for `embed_dataset`.
        DatasetError: The source does not exist, or generators failed for all of its rows.
        OutputDirectoryError: As for `embed_dataset`.
        LLMError: An LLM fails altogether, or for one node where `on_failure` is "fail".
        JournalError: A journal cannot be used.
    """
    listed = default_query_generators() if generators is None else list(generators)
    check_arguments([], listed, None)
    _refuse_limits(listed)
    names = [generator.name for generator in listed]
    settings = {"generators": names, "seed": seed, "columns": [id_column, text_column]}
    run = Run(source, output, settings, num_workers, cpus_per_worker, 0, part_bytes, show_progress)
    parts = run.check(**{f"generators[{i}]": generator for i, generator in enumerate(listed)})
    with shared_journals(listed) as journals:
        return run.finish(_Generate(listed, seed, journals), parts)


def _refuse_limits(generators: Sequence[Any]) -> None:
    limited = [g.settings for g in llm_generators(generators) if (g.settings.max_requests or g.settings.max_tokens)]
    if limited:
        raise ConfigError(
            f"max_requests={limited[0].max_requests}, max_tokens={limited[0].max_tokens} on a cluster",
            "no limit of a run, because no worker knows what the others asked",
            "Leave them out, and set a budget with the provider of the LLM; an interrupted call goes on when repeated.",
        )


@dataclass
class _AdapterPath:
    path: str


@dataclass
class _Embed:
    model: Any
    threads: int | None
    loaded: bool = False

    def run(self, rows: list[Row], output: Output, part: Part) -> dict[str, int]:
        self._load()
        usable = [row for row in rows if row.node is not None]
        vectors = dict(zip(map(id, usable), embed_each(self.model, usable), strict=True))
        output.write(part, rows, [vectors.get(id(row)) for row in rows])
        return {}

    def _load(self) -> None:
        if self.loaded:
            return
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        if isinstance(self.model, _AdapterPath):
            from llama_index_lora_embed.embedding import LoraEmbedding

            self.model = LoraEmbedding(self.model.path)
        self.loaded = True


def embed_each(embed_model: BaseEmbedding, rows: Sequence[Row]) -> list[Any]:
    """Vectors of the rows' nodes, all at once, or one by one if that fails; None, and an error in the row, for some."""
    import numpy as np

    texts = [embed_text(row.node) for row in rows if row.node is not None]
    try:
        found: list[Any] = embed_model.get_text_embedding_batch(texts) if texts else []
    except FATAL:
        raise
    except Exception:
        found = []
        for row, text in zip(rows, texts, strict=True):
            vector = _caught(row, lambda text=text: embed_model.get_text_embedding_batch([text])[0])
            found.append(vector)
    for number, (row, vector) in enumerate(zip(rows, found, strict=True)):
        if vector is not None and not np.isfinite(vector).all():
            row.error, found[number] = "the vector is not finite", None
    return found


def _caught(row: Row, work: Any) -> Any:
    """The result of work for a row; None, with an error in the row, if it failed for this row alone."""
    try:
        return work()
    except FATAL:
        raise
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}"
        return None


@dataclass
class _Generate:
    generators: list[Any]
    seed: int
    journals: dict[str, Any] = field(default_factory=dict)
    ready: bool = False

    def run(self, rows: list[Row], output: Output, part: Part) -> dict[str, int]:
        if not self.ready:
            use_journals(self.generators, self.journals)
            self.ready = True
        counts: dict[str, int] = {}
        usable = [r for r in rows if r.node is not None and r.node.get_content(metadata_mode=MetadataMode.NONE).strip()]
        for generator in self.generators:
            self._attach(generator, usable)
            for asked in llm_generators([generator]):
                for name, count in asdict(asked.report).items():
                    if isinstance(count, int):
                        counts[name] = counts.get(name, 0) + count
        output.write(part, rows)
        return counts

    def _attach(self, generator: QueryGenerator, rows: Sequence[Row]) -> None:
        nodes = [row.node for row in rows if row.node is not None]
        try:
            attach_queries(nodes, list(generator.generate(nodes, seed=self.seed)))
        except FATAL:
            raise
        except Exception:
            for row, node in zip(rows, nodes, strict=True):
                made = _caught(row, lambda node=node: list(generator.generate([node], seed=self.seed)))
                attach_queries([node], made or [])
