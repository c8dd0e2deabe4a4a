"""Servers and workers in processes of their own, for tests that kill them.

As a program it is a process that has torch loaded, and forks a server or a worker for each line of its input, so that
tests may start dozens of them. A line is JSON: {"start": "server" or "worker", "env", "log", "file_limit_mb"}. It
answers with the process's id.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def environment(data_dir: Path, models: dict[str, str], **settings: Any) -> dict[str, str]:
    """The environment of a service without tokens, in a hurry."""
    values = {
        **{"data_dir": data_dir, "auth": "off", "allowed_models": json.dumps(models), "device": "cpu"},
        **{"port": free_port(), "checkpoint_steps": 2, "lease_s": 2, "heartbeat_s": 0.2, "sweep_s": 0.3},
        **settings,
    }
    return {f"LORA_EMBED_{name.upper()}": str(value) for name, value in values.items()}


class Forks:
    """Forks processes of services; used as a context."""

    def __enter__(self) -> Forks:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.service_processes"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.stdin.close()  # type: ignore[union-attr]
        self._parent.wait(timeout=30)

    def start(self, name: str, env: dict[str, str], log: Path, file_limit_mb: int | None = None) -> int:
        """Start a "server" or a "worker"; its process id.

        `file_limit_mb` is the size beyond which no file of the process may grow: more fails as on a full disk.
        """
        order = {"start": name, "env": env, "log": str(log), "file_limit_mb": file_limit_mb}
        self._parent.stdin.write(json.dumps(order) + "\n")  # type: ignore[union-attr]
        self._parent.stdin.flush()  # type: ignore[union-attr]
        return int(self._parent.stdout.readline())  # type: ignore[union-attr]


class Processes:
    """The processes of one service by name; used as a context, at whose end they are killed.

    Args:
        forks: Starts them.
        env: Their environment (`environment`).
        log: File for their logs.
    """

    def __init__(self, forks: Forks, env: dict[str, str], log: Path) -> None:
        self.forks, self.env, self.log = forks, env, log
        self.pids: dict[str, int] = {}

    def start(self, name: str, file_limit_mb: int | None = None, **env: str) -> None:
        """Start the "server", or a worker of any name."""
        kind = "server" if name == "server" else "worker"
        self.pids[name] = self.forks.start(kind, {**self.env, **env}, self.log, file_limit_mb)

    def kill(self, name: str) -> None:
        """Kill a process with SIGKILL."""
        os.kill(self.pids.pop(name), signal.SIGKILL)

    def alive(self, name: str) -> bool:
        """Whether a process is still running."""
        try:
            os.kill(self.pids[name], 0)
        except ProcessLookupError:
            return False
        return True

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.pids):
            with suppress(ProcessLookupError):  # it ended by itself, which its log explains
                self.kill(name)


@contextmanager
def commands(env: dict[str, str], *modules: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start modules as a user does, `python -m <module>`; what is still running at the end is killed."""
    started = [
        subprocess.Popen([sys.executable, "-m", module], env={**os.environ, **env}, cwd=ROOT) for module in modules
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def until(condition: Any, seconds: float, what: str) -> Any:
    """The first true value of a condition, which may raise OSError meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds} s")


def api_of(env: dict[str, str]) -> Any:
    """A client that sends a request again while the server is down, as clients do."""
    import httpx

    base = f"http://127.0.0.1:{env['LORA_EMBED_PORT']}"

    def send(method: str, path: str, **more: Any) -> Any:
        def attempt() -> Any:
            try:
                answer = httpx.request(method, base + path, timeout=10, **more)
            except httpx.TransportError:
                return None
            return answer if answer.status_code < 500 else None

        return until(attempt, 30, f"{method} {path}")

    return send


def status_of(api: Any, job_id: str) -> str:
    """The status of a job."""
    return str(api("GET", f"/v1/finetune/{job_id}").json()["status"])


def files_of(folder: Path) -> dict[str, bytes]:
    """The files that make an adapter."""
    return {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}


def settings_of(env: dict[str, str]) -> Any:
    """The settings that an environment gives a process."""
    import pytest

    from llama_index_lora_embed.service.settings import ServiceSettings

    names = {name: value for name, value in env.items() if name.startswith("LORA_EMBED_")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        return ServiceSettings()


def calm_run(env: dict[str, str], job_id: str, output: Path) -> dict[str, bytes]:
    """The files of an undisturbed run of a job's data and arguments."""
    from llama_index_lora_embed.engines import run_finetune
    from llama_index_lora_embed.service.jobs.order import config_of
    from llama_index_lora_embed.service.services import Services

    with Services(settings_of(env)) as services:
        config = config_of(services.jobs.get(job_id), services.settings)
    run_finetune(config.replace(output=config.output.replace(model_output_path=str(output))))
    return files_of(output)


def _main() -> None:
    import torch

    from llama_index_lora_embed.service import __main__ as server
    from llama_index_lora_embed.service.jobs import worker

    worker._load_training()

    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that were killed leave nothing
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number in (1, 2):
                os.dup2(log, number)
            os.environ.update(order["env"])
            if order["file_limit_mb"] is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit_mb"] * 2**20,) * 2)
            (server if order["start"] == "server" else worker).main()
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    _main()
