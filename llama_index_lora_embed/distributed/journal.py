"""One journal for the workers of a cluster: an actor on the driver's machine has the file open."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llama_index_lora_embed.data.llm.journal import Journal
from llama_index_lora_embed.data.questions.llm import LLMQueryGenerator


class JournalActor:
    """Keeps a journal's file open and writes for all workers; answers that arrive together share one sync to disk.

    The file is opened by the first call, so that its errors reach the caller. An answer that is sent again, because
    the reply to it was lost, is written once.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._journal: Journal | None = None
        self._unwritten: list[dict[str, Any]] = []
        self._writing = asyncio.Lock()

    async def open(self) -> None:
        """Open the file, if it is not open."""
        if self._journal is None:
            self._journal = Journal(self._path)

    async def look_up(self, key: str) -> tuple[dict[str, Any] | None, int]:
        """The usable answer under a key, or None, and the number of unusable ones."""
        await self.open()
        assert self._journal is not None
        return self._journal.get(key), self._journal.unusable_answers(key)

    async def append(self, records: list[dict[str, Any]]) -> None:
        """Write records and wait until they are on disk."""
        await self.open()
        self._unwritten += records
        async with self._writing:
            if batch := self._unwritten[:]:
                await asyncio.to_thread(self._write, batch)
                del self._unwritten[: len(batch)]

    def _write(self, batch: list[dict[str, Any]]) -> None:
        assert self._journal is not None
        usable = {record["key"]: record for record in reversed(batch) if record.get("ok")}
        new = [r for r in batch if not r.get("ok") or (r is usable[r["key"]] and r["key"] not in self._journal)]
        self._journal.append(new)

    async def close(self) -> None:
        """Release the file."""
        if self._journal is not None:
            self._journal.close()


class SharedJournal:
    """What a worker has instead of a `Journal`: the same methods, by the journal's actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._found: dict[str, tuple[dict[str, Any] | None, int]] = {}

    def _look_up(self, key: str) -> tuple[dict[str, Any] | None, int]:
        if key not in self._found:
            self._found[key] = ray.get(self._actor.look_up.remote(key))
        return self._found[key]

    def __contains__(self, key: str) -> bool:
        """Whether there is a usable answer under this key."""
        return self._look_up(key)[0] is not None

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of the usable answer under a key, or None."""
        return self._look_up(key)[0]

    def unusable_answers(self, key: str) -> int:
        """The number of answers under this key with nothing usable in them."""
        return self._look_up(key)[1]

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records and wait until they are on disk; errors are those of `Journal.append`."""
        records = list(records)
        ray.get(self._actor.append.remote(records))
        for record in records:
            self._found.pop(record["key"], None)

    def __enter__(self) -> SharedJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self._found.clear()


def start_journals(generators: Iterable[Any]) -> dict[str, Any]:
    """An actor for each journal that LLM query generators name, by path; its file is open.

    Raises:
        JournalInUseError: Another run has it open.
        JournalError: It cannot be used.
    """
    place = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=place)(JournalActor)
    actors = {path: actor.remote(path) for path in {generator.journal for generator in llm_generators(generators)}}
    try:
        ray.get([started.open.remote() for started in actors.values()])
    except BaseException:
        stop_journals(actors)
        raise
    return actors


@contextmanager
def shared_journals(generators: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """`start_journals`, whose files are released at the end."""
    actors = start_journals(generators)
    try:
        yield actors
    finally:
        stop_journals(actors)


def stop_journals(actors: dict[str, Any]) -> None:
    """End the journals' actors, which releases their files."""
    if not ray.is_initialized():
        return
    for actor in actors.values():
        with suppress(ray.exceptions.RayError):  # one whose file did not open
            ray.get(actor.close.remote())
        ray.kill(actor)


def use_journals(generators: Iterable[Any], actors: dict[str, Any]) -> None:
    """Have a worker's LLM query generators use the shared journals."""
    for generator in llm_generators(generators):
        if generator.journal in actors:
            generator.use_journal(SharedJournal(actors[generator.journal]))


def llm_generators(generators: Iterable[Any]) -> Iterator[LLMQueryGenerator]:
    """All LLM query generators, those within others included."""
    for generator in generators:
        if isinstance(generator, LLMQueryGenerator):
            yield generator
        yield from llm_generators(getattr(generator, "generators", ()))
