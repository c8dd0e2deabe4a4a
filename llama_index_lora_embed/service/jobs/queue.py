"""The queue that wakes workers: a message is the id of a job and nothing else; the database is the truth.

Messages may be lost with the queue, or arrive twice: the sweep enqueues queued jobs again, and only one lease is given.
huey's storage is used alone. Its tasks would be pickles, which run code when they are read, and its consumer runs
threads, but training needs the main thread, to which signals are delivered.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from huey.storage import BaseStorage, RedisStorage, SqliteStorage

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.service.settings import ServiceSettings

_NAME = "loraembed"
_POLL_S = 0.2


class JobQueue:
    """A queue of job ids, on SQLite or Redis.

    Args:
        settings: Of the service.

    Raises:
        ConfigError: `queue_url` is no URL of Redis.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._storage: BaseStorage
        url = settings.queue_url
        if url is None:
            settings.folder.mkdir(parents=True, exist_ok=True)
            self._storage = SqliteStorage(_NAME, filename=str(settings.folder / "queue.db"), timeout=30)
        elif url.startswith(("redis://", "rediss://", "unix://")):
            require("redis")
            self._storage = RedisStorage(_NAME, url=url, blocking=False)
        else:
            hint = "Correct LORA_EMBED_QUEUE_URL, or leave it out for SQLite."
            raise ConfigError(f"queue_url={url!r}", "a URL such as redis://localhost:6379/0", hint)

    def put(self, job_id: str) -> None:
        """Add a job's id."""
        self._storage.enqueue(job_id.encode())

    def take(self, timeout: float, stop: Callable[[], bool] = lambda: False) -> str | None:
        """The oldest id, or None if there is none within `timeout` seconds, or `stop()` became true."""
        deadline = time.monotonic() + timeout
        while not stop():
            message = self._storage.dequeue()
            if message is not None:
                return bytes(message).decode(errors="replace")
            if time.monotonic() >= deadline:
                break
            time.sleep(min(_POLL_S, timeout))
        return None

    def __len__(self) -> int:
        return int(self._storage.queue_size())

    def close(self) -> None:
        """Close the connection."""
        self._storage.close()
