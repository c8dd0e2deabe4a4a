"""A job over the parts of an input, by Ray Data: checks before it, and what became of each row after it."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import ray
from llama_index.core.schema import BaseNode, TextNode

from llama_index_lora_embed.config.base import is_int
from llama_index_lora_embed.core.errors import ClusterError, ConfigError, DatasetError
from llama_index_lora_embed.data.llm.client import LLMReport
from llama_index_lora_embed.data.readers.parts import NODE_COLUMN, Part, Row, Source, plan_parts, read_part
from llama_index_lora_embed.distributed.cluster import (
    check_resources,
    check_storage,
    check_travels,
    check_workers,
    connect,
)
from llama_index_lora_embed.distributed.parts import Output

_RETRIES = 20  # of a part whose worker died; a part that kills its worker each time would be repeated forever
_SHOWN = 20


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


class Job(Protocol):
    """What a worker does with the rows of a part; it is pickled, and prepares itself at the first part."""

    def run(self, rows: list[Row], output: Output, part: Part) -> dict[str, int]:
        """Write the part's file; returns counts for the report."""
        ...


@dataclass(frozen=True)
class Run:
    """Where the rows of a job come from and go to, and its workers; `settings` are kept with the output."""

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

    def check(self, **objects: Any) -> list[Part]:
        """The parts of the source, if the cluster can do the job and the objects can be sent there."""
        check_travels(**objects)
        parts = plan_parts(self.source, self.part_bytes)
        connect()
        check_resources(self.num_workers, {"CPU": self.cpus, "GPU": self.gpus})
        check_workers()
        check_storage(self.output, what="output")
        return parts

    def finish(self, job: Job, parts: Sequence[Part], vector_store: Any | None = None) -> PartsReport:
        """Do the job for the parts that are missing, and read what became of all."""
        output = Output(self.output)
        missing = output.missing(parts, self.settings)
        counts: dict[str, Any] = {}
        report = PartsReport(output.path, parts=len(parts), reused=len(parts) - len(missing))
        waiting = {part.number for part in missing}
        with closing(self._run(job, missing)) as finished:
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

    def _run(self, job: Job, parts: Sequence[Part]) -> Generator[dict[str, int], None, None]:
        """The counts of each part, in their order."""
        from ray.data import ActorPoolStrategy

        if not parts:
            return
        sent = [ray.put(job)]  # alive as long as this generator, and out of reach of Ray's own unpacking
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


class _Worker:
    """An actor of Ray Data: parts in, counts out.

    The job is in Ray's object store, because an actor whose arguments are larger than 100 kB is not started again.
    """

    def __init__(self, sent: list[Any], output: str, columns: Sequence[str | None]) -> None:
        self._job: Job = ray.get(sent[0])
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
