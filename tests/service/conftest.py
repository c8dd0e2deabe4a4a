"""Fixtures of the service: settings in a temporary folder, databases, and an application."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.services import Services
from llama_index_lora_embed.service.settings import ServiceSettings


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/service.db"


@pytest.fixture
def service_settings(tmp_path: Path, tiny_model: str) -> ServiceSettings:
    """Of a service without tokens that may train the tiny model."""
    return ServiceSettings(
        data_dir=tmp_path / "data", auth="off", allowed_models={"tiny": tiny_model}, device="cpu", checkpoint_steps=2
    )


@pytest.fixture
def services(service_settings: ServiceSettings) -> Iterator[Services]:
    with Services(service_settings) as made:
        yield made


@pytest.fixture
def client(service_settings: ServiceSettings) -> Iterator[Any]:
    """A client of the application in this process; errors of the server are answers, as over the network."""
    with TestClient(create_app(service_settings), "http://127.0.0.1", raise_server_exceptions=False) as made:
        yield made
