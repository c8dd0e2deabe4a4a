"""Clients that are slow or silent: they are cut off or held back, and others are served meanwhile."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from sqlmodel import Session

from llama_index_lora_embed.service.__main__ import Server
from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.jobs.state import Failed, JobError, JobSpec
from llama_index_lora_embed.service.jobs.tables import JobEventRow
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.helpers.service_processes import free_port, until

WITHIN = 30


@contextmanager
def serving(tmp_path: Any, tiny_model: str, **settings: Any) -> Iterator[tuple[int, Any]]:
    """The port of the server that users start, in a thread, and its application."""
    values = {"auth": "off", "allowed_models": {"tiny": tiny_model}, "shutdown_s": 1, **settings}
    chosen = ServiceSettings(data_dir=tmp_path / "data", port=free_port(), **values)
    server = Server(app := create_app(chosen), chosen)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, WITHIN, "the server has started")
    yield chosen.port, app
    server.handle_exit(0, None)
    thread.join(WITHIN)
    assert not thread.is_alive()


def connected(port: int, sent: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=WITHIN)
    made.sendall(sent)
    return made


def dripped(connection: socket.socket, part: bytes, most: int = 400) -> bytes:
    """What comes back while a part is sent again and again."""
    connection.settimeout(0.05)
    for _ in range(most):
        try:
            connection.sendall(part)
            return connection.recv(4096)
        except TimeoutError:
            continue
        except OSError:  # closed in between
            return b""
    raise AssertionError("the server took everything")


def served(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=WITHIN).status_code == 200


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"], ids=["nothing", "half a header"]
)
def test_connections_without_a_request_are_closed(tmp_path, tiny_model, sent):
    with serving(tmp_path, tiny_model, client_timeout_s=0.5) as (port, _), ExitStack() as stack:
        silent = [stack.enter_context(connected(port, sent)) for _ in range(50)]
        assert served(port)
        assert {connection.recv(100) for connection in silent} == {b""}


def test_a_connection_is_closed_where_its_second_request_has_no_end(tmp_path, tiny_model):
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with serving(tmp_path, tiny_model, client_timeout_s=0.5) as (port, _), connected(port, whole) as connection:
        assert b"200 OK" in connection.recv(4096)
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert dripped(connection, b"x") == b""


def test_headers_without_an_end_are_refused(tmp_path, tiny_model):
    with (
        serving(tmp_path, tiny_model) as (port, _),
        connected(port, b"GET /health HTTP/1.1\r\nX-Long: ") as connection,
    ):
        assert dripped(connection, b"x" * 4096).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("path", ["/v1/evaluate", "/v1/files"])
def test_a_body_that_comes_byte_by_byte_is_refused(tmp_path, tiny_model, path):
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    head += 'Content-Length: 100000\r\n\r\n--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    with serving(tmp_path, tiny_model, client_timeout_s=0.5) as (port, _), ExitStack() as stack:
        slow = [stack.enter_context(connected(port, head.encode())) for _ in range(50)]
        assert served(port)
        answer = dripped(slow[0], b" ")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"body_too_slow" in answer
        assert b"connection: close" in answer.lower()


def test_a_large_body_may_take_its_time(tmp_path, tiny_model):
    def parts() -> Iterator[bytes]:
        for _ in range(4):
            time.sleep(0.3)
            yield b" " * 5000
        yield b"{}"

    with serving(tmp_path, tiny_model, client_timeout_s=1) as (port, _):
        url, headers = f"http://127.0.0.1:{port}/v1/evaluate", {"Content-Type": "application/json"}
        answer = httpx.post(url, content=parts(), headers=headers, timeout=WITHIN)
        assert answer.status_code == 400  # what it lacks is said
        assert "queries" in answer.text


@pytest.mark.slow
def test_events_are_read_no_faster_than_a_client_takes_them(tmp_path, tiny_model, monkeypatch):
    with serving(tmp_path, tiny_model) as (port, app), socket.socket() as reader:
        store = app.state.services.jobs
        job, _ = store.create(JobSpec(owner="local", model="tiny", data="queries"))
        event = Failed(attempt=1, error=JobError(code="internal_error", message="x" * 3000)).model_dump_json()
        row = {"job_id": job.id, "time": 0.0, "kind": "failed", "data": event}
        with Session(store.database.engine) as session:  # 30 MB, more than the buffers of two sockets
            session.add_all(JobEventRow(**row, sequence=n, status="running") for n in range(2, 10_000))
            session.add(JobEventRow(**row, sequence=10_000, status="failed"))
            session.commit()
        pages: list[int] = []
        real = store.events
        monkeypatch.setattr(store, "events", lambda *arguments: pages.append(1) or real(*arguments))
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(WITHIN)
        reader.connect(("127.0.0.1", port))
        reader.sendall(f"GET /v1/finetune/{job.id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        until(lambda: pages, WITHIN, "the stream has begun")
        before = -1
        while before != len(pages):  # until the server waits for the reader
            before = len(pages)
            assert served(port)
            time.sleep(1)
        assert before < 8
        tail = b""
        while b"id: 10000" not in tail:
            tail = tail[-100:] + reader.recv(2**16)
        assert len(pages) >= 10
