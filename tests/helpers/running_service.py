"""A service as users run it, for clients: a server process and a worker process; or an application in a thread."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.helpers.service_processes import commands, environment, free_port, until


@dataclass(frozen=True)
class RunningService:
    """Where a service is, and a token with all scopes but admin."""

    url: str
    token: str
    settings: ServiceSettings


@contextmanager
def running_service(folder: Path, tiny_model: str) -> Iterator[RunningService]:
    """Start server and worker, which may train the model "tiny"."""
    env = environment(folder, {"tiny": tiny_model}, auth="on", checkpoint_steps=4)
    settings = ServiceSettings(data_dir=folder, allowed_models={"tiny": tiny_model})
    with Services(settings) as services:
        _, token = services.tokens.create("test", ["train", "read", "embed"])
    url = f"http://127.0.0.1:{env['LORA_EMBED_PORT']}"
    package = "llama_index_lora_embed.service"
    with commands(env, package, f"{package}.jobs.worker"):
        until(lambda: urllib.request.urlopen(f"{url}/ready").status == 200, 120, "the server is ready")
        yield RunningService(url, token, settings)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an application that is served by a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, 30, "the server has started")
    yield f"http://127.0.0.1:{server.config.port}"
    server.should_exit = True
    thread.join()
