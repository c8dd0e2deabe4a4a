"""Real servers for tests: PostgreSQL and Redis from the system's packages, in a temporary folder, as another user."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.service_processes import free_port, until


@contextmanager
def postgresql() -> Iterator[str]:
    """URL of an empty PostgreSQL database; skips where it is not installed."""
    initdb, server = shutil.which("initdb"), shutil.which("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = _other_user("postgres")
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        folder.chmod(0o777)
        run = {"user": user, "cwd": folder} if user else {"cwd": folder}
        data = folder / "data"
        command = [initdb, "--pgdata", str(data), "--username", "test", "--auth", "trust", "--encoding", "UTF8"]
        subprocess.run([*command, "--no-sync"], check=True, capture_output=True, **run)
        arguments = [server, "-D", str(data), "-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1"]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(arguments, stdout=log, stderr=log, **run)
        try:
            import psycopg

            def connect() -> bool:
                try:
                    psycopg.connect(host="127.0.0.1", port=port, user="test", dbname="postgres").close()
                except psycopg.OperationalError:
                    return False
                return True

            until(connect, 30, "PostgreSQL")
            yield f"postgresql://test@127.0.0.1:{port}/postgres"
        finally:
            process.terminate()
            process.wait(timeout=30)


@contextmanager
def redis_server() -> Iterator[str]:
    """URL of an empty Redis server; skips where it is not installed."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("Redis is not installed (Debian: apt-get install redis-server)")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [server, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        try:
            import redis

            client = redis.Redis(port=port)

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.exceptions.ConnectionError:
                    return False

            until(answers, 30, "Redis")
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _other_user(name: str) -> str | None:
    """A user to run as where these tests run as root, which PostgreSQL refuses to do; None to stay the same."""
    if os.geteuid() != 0:
        return None
    for user in (name, "nobody"):
        try:
            return pwd.getpwnam(user).pw_name
        except KeyError:
            continue
    pytest.skip("PostgreSQL does not run as root, and there is no other user")
