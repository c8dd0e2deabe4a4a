"""A service as users run it: a server process and a worker process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.settings import ServiceSettings


@dataclass(frozen=True)
class RunningService:
    """Where a service is, and a token with all scopes but admin."""

    url: str
    token: str
    settings: ServiceSettings


@contextmanager
def running_service(folder: Path, tiny_model: str, **settings: Any) -> Iterator[RunningService]:
    """Start server and worker, and stop them at the end."""
    values = {"data_dir": str(folder / "data"), "port": free_port(), "device": "cpu", "checkpoint_steps": 4, **settings}
    values["allowed_models"] = {"tiny": tiny_model}
    known = ServiceSettings(**values)
    with Services(known) as services:
        _, token = services.tokens.create("test", ["train", "read", "embed"])
    variables = {f"LORA_EMBED_{k.upper()}": json.dumps(v) if isinstance(v, dict) else str(v) for k, v in values.items()}
    processes = []
    try:
        for module in ("service", "service.jobs.worker"):
            with open(folder / f"{module}.log", "wb") as log:
                command = [sys.executable, "-m", f"llama_index_lora_embed.{module}"]
                processes.append(subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log))
        url = f"http://127.0.0.1:{known.port}"
        _wait_until_ready(url, processes)
        yield RunningService(url, token, known)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an application that is served by a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.config.port}"
    server.should_exit = True
    thread.join()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_until_ready(url: str, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for _ in range(600):
        assert all(process.poll() is None for process in processes)
        try:
            urllib.request.urlopen(f"{url}/ready").close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server did not start within a minute")
