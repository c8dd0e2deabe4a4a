"""Queries and vectors of more nodes than one machine or its memory holds, by Ray Data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import ray
from llama_index.core.schema import BaseNode, MetadataMode, TextNode

from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.errors import (
    AdapterError,
    BaseModelMismatchError,
    ClusterError,
    ConfigError,
    DatasetError,
    JournalError,
    LLMError,
    MissingExtraError,
    ModelNotFoundError,
)
from llama_index_lora_embed.core.files import absolute
from llama_index_lora_embed.data.build import check_arguments, default_query_generators
from llama_index_lora_embed.data.llm.client import LLMReport
from llama_index_lora_embed.data.questions.base import QueryGenerator, attach_queries, embed_text
from llama_index_lora_embed.data.readers.parts import NODE_COLUMN, Part, Row, Source, plan_parts, read_part
from llama_index_lora_embed.distributed.cluster import (
    check_resources,
    check_storage,
    check_travels,
    check_workers,
    connect,
)
from llama_index_lora_embed.distributed.journal import llm_generators, shared_journals, use_journals
from llama_index_lora_embed.distributed.parts import Output

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding


_PART_BYTES = 1 << 20
_RETRIES = 20  # of a part whose worker died; a part that kills its worker each time would be repeated forever
_SHOWN = 20
# what every node would meet, so that the run ends
FATAL = (
    AdapterError, BaseModelMismatchError, JournalError, LLMError, MissingExtraError, ModelNotFoundError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class PartsReport:
    """What became of the rows of an input.

    Attributes:
        path: Folder of the Parquet files. In the order of their names, their rows are those of the input.
        nodes: Rows read, those that failed included.
        failed: Rows with an `error` instead of a result.
        problems: The first twenty of these, with their ids.
        parts: Files written; `reused` of them by an earlier run that was interrupted.
        reused: See `parts`.
        queries: Queries in the metadata of the nodes.
        llm: Requests to LLMs in this run, without those of workers that died.
    """

    path: str
    nodes: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)
    parts: int = 0
    reused: int = 0
    queries: int = 0
    llm: LLMReport = field(default_factory=LLMReport)

    def __str__(self) -> str:
        text = f"{self.nodes} nodes in {self.parts} files of {self.path!r} ({self.reused} of an earlier run)"
        if self.queries:
            text += f", {self.queries} queries"
        if self.llm != LLMReport():
            text += f"\n{self.llm}"
        return "\n".join([f"{text}; {self.failed} failed", *self.problems])


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
    job = _Embed(model, max(1, math.floor(cpus_per_worker)) if not gpus_per_worker else None)
    run = _Run(
        job, source, output, {"embed_model": identity, "columns": [id_column, text_column]},
        num_workers, cpus_per_worker, gpus_per_worker, part_bytes, show_progress,
    )  # fmt: skip
    connect()
    check_travels(embed_model=model)
    return run.finish(vector_store)


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
    settings = {"generators": [generator.name for generator in listed], "seed": seed}
    run = _Run(
        _Generate(listed, seed), source, output, {**settings, "columns": [id_column, text_column]},
        num_workers, cpus_per_worker, 0, part_bytes, show_progress,
    )  # fmt: skip
    connect()
    check_travels(**{f"generators[{i}]": generator for i, generator in enumerate(listed)})
    with shared_journals(listed) as journals:
        return replace(run, job=replace(run.job, journals=journals)).finish(None)


def _refuse_limits(generators: Sequence[Any]) -> None:
    limited = [g.settings for g in llm_generators(generators) if (g.settings.max_requests or g.settings.max_tokens)]
    if limited:
        raise ConfigError(
            f"max_requests={limited[0].max_requests}, max_tokens={limited[0].max_tokens} on a cluster",
            "no limit of a run, because no worker knows what the others asked",
            "Leave them out, and set a budget with the provider of the LLM; an interrupted call goes on when repeated.",
        )


class _Job(Protocol):
    """What a worker does with the rows of a part; it is pickled, and prepares itself at the first part."""

    def run(self, rows: list[Row], output: Output, part: Part) -> dict[str, int]:
        """Write the part's file; returns counts for the report."""
        ...


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


class _Worker:
    """An actor of Ray Data: parts in, counts out.

    The job is in Ray's object store, because an actor whose arguments are larger than 100 kB is not started again.
    """

    def __init__(self, sent: list[Any], output: str, columns: Sequence[str | None]) -> None:
        self._job: _Job = ray.get(sent[0])
        self._output, self._columns = Output(output), columns

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (number,), (path,), (start,), (stop,) = (batch[name] for name in ("number", "path", "start", "stop"))
        part = Part(int(number), str(path), int(start), int(stop))
        try:
            return {"counts": [json.dumps(self._run(part))], "error": [b""]}
        except Exception as error:  # Ray Data passes only its text on
            return {"counts": ["{}"], "error": [ray.cloudpickle.dumps(error)]}

    def _run(self, part: Part) -> dict[str, int]:
        return self._job.run(list(read_part(part, *self._columns)), self._output, part)


@dataclass(frozen=True)
class _Run:
    job: Any
    source: Source
    output: str | os.PathLike[str]
    settings: dict[str, Any]
    num_workers: int
    cpus: float
    gpus: float
    part_bytes: int
    show_progress: bool

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r}: expected {expected}"
            for name, value, expected, right in (
                ("num_workers", self.num_workers, "a whole number of at least 1", is_int(self.num_workers, 1)),
                ("part_bytes", self.part_bytes, "a whole number of at least 1", is_int(self.part_bytes, 1)),
                ("cpus_per_worker", self.cpus, "a number of at least 0", self.cpus >= 0),
                ("gpus_per_worker", self.gpus, "a number of at least 0", self.gpus >= 0),
            )
            if not right
        ]
        if problems:
            raise ConfigError(f"{len(problems)} wrong argument(s)", "arguments as documented", "Correct:", problems)

    def finish(self, vector_store: Any | None) -> PartsReport:
        """Check, run the parts that are missing, and read what became of all."""
        parts = plan_parts(self.source, self.part_bytes)
        check_resources(self.num_workers, {"CPU": self.cpus, "GPU": self.gpus})
        check_workers()
        check_storage(self.output, what="output")
        output = Output(self.output)
        missing = output.missing(parts, self.settings)
        counts: dict[str, Any] = {}
        report = PartsReport(output.path, parts=len(parts), reused=len(parts) - len(missing))
        waiting = {part.number for part in missing}
        with closing(self._run(missing)) as finished:
            for part in parts:
                if part.number in waiting:
                    for name, count in next(finished).items():
                        counts[name] = counts.get(name, 0) + count
                report = _read_back(output, part.number, report, vector_store)
        if report.nodes and report.failed == report.nodes:
            raise DatasetError(
                f"{report.nodes} rows, of which each failed", "rows with an id and a text", "Correct:", report.problems
            )
        return replace(report, llm=replace(LLMReport(), **counts))

    def _run(self, parts: Sequence[Part]) -> Generator[dict[str, int], None, None]:
        """The counts of each part, in their order."""
        from ray.data import ActorPoolStrategy

        if not parts:
            return
        sent = [ray.put(self.job)]  # alive as long as this generator, and out of reach of Ray's own unpacking
        with _ordered(self.show_progress):
            dataset = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map_batches(
                _Worker,
                fn_constructor_args=(sent, Output(self.output).path, self.settings["columns"]),
                compute=ActorPoolStrategy(size=min(self.num_workers, len(parts))),
                batch_size=1,
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                max_task_retries=_RETRIES,
            )
            rows = iter(dataset.iter_rows())
            while (row := _next(rows)) is not None:
                if row["error"]:
                    raise ray.cloudpickle.loads(row["error"])
                yield json.loads(row["counts"])


def _next(rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """The next row, or None after the last.

    Raises:
        ClusterError: Workers died too often.
    """
    try:
        return next(rows, None)
    except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
        raise ClusterError(
            f"workers that died ({error})",
            "workers that finish their part",
            "Check their memory (smaller part_bytes, fewer workers on a node) and the logs of Ray. "
            "The same call goes on where this one stopped.",
        ) from error


def _read_back(output: Output, number: int, report: PartsReport, vector_store: Any | None) -> PartsReport:
    """The report with a part's rows, which are added to the vector store."""
    columns = ["id", "error", "queries"] + ([] if vector_store is None else [NODE_COLUMN, "embedding"])
    rows = output.read(number, columns).to_pylist()
    failed = [row for row in rows if row["error"] is not None]
    if vector_store is not None and (nodes := [_embedded(row) for row in rows if row["error"] is None]):
        vector_store.add(nodes)
    shown = [f"{row['id']}: {row['error']}" for row in failed[: _SHOWN - len(report.problems)]]
    return replace(
        report,
        nodes=report.nodes + len(rows),
        failed=report.failed + len(failed),
        queries=report.queries + sum(row["queries"] for row in rows),
        problems=[*report.problems, *shown],
    )


def _embedded(row: dict[str, Any]) -> BaseNode:
    node = TextNode.from_dict(json.loads(row[NODE_COLUMN]))
    node.embedding = row["embedding"]
    return node


@contextmanager
def _ordered(show_progress: bool) -> Iterator[None]:
    """Ray Data keeps the order of rows, which it does not by default, and shows bars or none."""
    from ray.data import DataContext

    context = DataContext.get_current()
    before = context.execution_options.preserve_order, context.enable_progress_bars
    context.execution_options.preserve_order, context.enable_progress_bars = True, show_progress
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before
