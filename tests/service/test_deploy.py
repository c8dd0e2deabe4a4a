"""The files of deploy/: they start modules that exist, with settings that the service has."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_index_lora_embed.service.settings import ServiceSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = ("lora-embed-server.service", "lora-embed-worker.service")
MODULES = {"llama_index_lora_embed.service", "llama_index_lora_embed.service.jobs.worker"}


def unit(name: str) -> Any:
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]  # the case of names matters
    parsed.read(DEPLOY / name)
    return parsed["Service"]


def module_of(command: list[str]) -> str:
    assert command[1] == "-m"
    assert importlib.util.find_spec(command[2]) is not None
    return command[2]


def test_compose_starts_server_and_worker_with_settings_that_are_valid(monkeypatch):
    services = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
    assert {module_of(services[name]["command"]) for name in ("server", "worker")} == MODULES
    for name in ("server", "worker"):
        environment = services[name]["environment"]
        for key, value in environment.items():
            monkeypatch.setenv(key, re.sub(r"\$\{\w+:\?[^}]*\}", "secret", value))
        made = ServiceSettings()
        assert {key.removeprefix("LORA_EMBED_").lower() for key in environment} <= made.model_fields_set
        assert made.database == "postgresql+psycopg://lora_embed:secret@postgres/lora_embed"
        assert {"postgres", "redis"} == set(services[name]["depends_on"]) == set(services) - {"server", "worker"}
        assert made.queue_url == "redis://redis:6379/0"
    assert services["server"]["ports"] == [f"127.0.0.1:{made.port}:{made.port}"], "not for strangers, without TLS"
    assert int(services["server"]["stop_grace_period"].removesuffix("s")) > made.shutdown_s


def _works(command: list[str]) -> bool:
    """Whether it is installed; `docker` may lack its plugin."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run([*command, "version"], capture_output=True).returncode == 0


COMPOSE = next(filter(_works, (["docker", "compose"], ["docker-compose"])), [])


@pytest.mark.skipif(not COMPOSE, reason="needs docker compose, which reads the file without a daemon")
def test_compose_reads_its_file_and_asks_for_a_password(tmp_path):
    command = [*COMPOSE, "--file", str(DEPLOY / "docker-compose.yml"), "config"]
    asked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert asked.returncode != 0
    assert "write it into .env" in asked.stderr
    given = {**os.environ, "POSTGRES_PASSWORD": "secret"}
    read = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    assert set(yaml.safe_load(read.stdout)["services"]) == {"server", "worker", "postgres", "redis"}


def test_the_image_installs_extras_that_exist_and_sets_settings_that_exist():
    text = (DEPLOY / "Dockerfile").read_text()
    extras = re.search(r"'\.\[([\w,-]+)\]'", text)[1].split(",")  # type: ignore[index]
    declared = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert set(extras) <= declared
    names = re.findall(r"LORA_EMBED_(\w+)=", text)
    assert names
    assert {name.lower() for name in names} <= set(ServiceSettings.model_fields)


def test_units_start_the_same_and_give_each_its_time_to_stop():
    services = [unit(name) for name in UNITS]
    assert {module_of(shlex.split(service["ExecStart"])) for service in services} == MODULES
    assert int(services[0]["TimeoutStopSec"]) > ServiceSettings(data_dir="d").shutdown_s
    for service in services:
        name, value = shlex.split(service["Environment"])[0].split("=")
        assert name == "LORA_EMBED_DATA_DIR"
        assert Path(value) == Path("/var/lib") / service["StateDirectory"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_knows_every_line_of_a_unit(tmp_path, name):
    text = (DEPLOY / name).read_text().replace("/opt/lora-embed/venv/bin/python", sys.executable)
    (tmp_path / name).write_text(text.replace("User=lora-embed", "User=root"))
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True)
    about_the_unit = [line for line in done.stderr.splitlines() if name in line]
    assert (done.returncode, about_the_unit) == (0, [])
