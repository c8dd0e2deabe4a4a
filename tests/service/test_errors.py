import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from llama_index_lora_embed.core.errors import DatasetError
from llama_index_lora_embed.service.errors import ServiceError, install_error_handlers


@pytest.fixture
def app():
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/raise/{what}")
    def fail(what: str, number: int = 0) -> None:
        raise {
            "service": ServiceError("x", "y", "Do z.", status=429, code="too_many", param="p", headers={"A": "b"}),
            "package": DatasetError("a set with 2 problems", "none", "Mend:", ["one", "two"]),
            "database": OperationalError("SELECT secret", {}, Exception("disk I/O error")),
            "unexpected": RuntimeError("/secret/path"),
        }[what]

    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_errors_of_the_service_and_of_the_package_have_openais_shape(app):
    answer = app.get("/raise/service")
    expected = {"message": "got x; expected y. Do z.", "type": "rate_limit_error", "param": "p", "code": "too_many"}
    assert (answer.status_code, answer.json()) == (429, {"error": expected})
    assert answer.headers["A"] == "b"
    answer = app.get("/raise/package")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["problems"]) == ("invalid_request_error", ["one", "two"])


def test_all_wrong_parameters_unknown_routes_and_methods_have_the_same_shape(app):
    answer = app.get("/raise/service?number=many")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "number")
    for answer, status in ((app.get("/nowhere"), 404), (app.post("/raise/service"), 405)):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("what", "status"), [("unexpected", 500), ("database", 503)])
def test_unexpected_errors_say_nothing_of_the_inside(app, what, status):
    answer = app.get(f"/raise/{what}")
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
