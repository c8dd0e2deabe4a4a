from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from llama_index_lora_embed.service.app import create_app
from llama_index_lora_embed.service.settings import ServiceSettings
from tests.helpers.pages import Visitor


@pytest.fixture
def app(service_settings: ServiceSettings) -> Any:
    """A service that asks for tokens."""
    return create_app(ServiceSettings(**{**service_settings.model_dump(), "auth": "on"}))


@pytest.fixture
def visit(app: Any) -> Iterator[Callable[..., Visitor]]:
    """A visitor with a token of some scopes, logged in; or, without scopes, one who is not."""
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False):

        def made(*scopes: str) -> Visitor:
            visitor = Visitor(TestClient(app, "http://127.0.0.1", raise_server_exceptions=False))
            if scopes:
                token = app.state.services.tokens.create("someone", scopes)[1]
                assert visitor.log_in(token).status_code == 303
            return visitor

        yield made
