"""`ServiceError`, and the JSON of errors: OpenAI's shape on all routes, without tracebacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError, TimeoutError
from starlette.exceptions import HTTPException

from llama_index_lora_embed.core.errors import LoraEmbedError

logger = logging.getLogger(__name__)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ServiceError(LoraEmbedError):
    """A request that cannot be served.

    Never with status 409: OpenAI's clients send a request again that was answered so, up to three times.

    Args:
        got: As `LoraEmbedError`.
        expected: As `LoraEmbedError`.
        hint: As `LoraEmbedError`.
        problems: As `LoraEmbedError`.
        status: HTTP status.
        code: Short name for programs, such as "job_not_found".
        param: Field of the request that is wrong.
        headers: More headers of the answer.
    """

    def __init__(
        self,
        got: str,
        expected: str,
        hint: str,
        problems: Sequence[str] = (),
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(got, expected, hint, problems)
        self.status, self.code, self.param, self.headers = status, code, param, headers


def not_found(what: str, name: str, hint: str) -> ServiceError:
    """The error (404) for something that does not exist, or belongs to another token."""
    code = f"{what.replace(' ', '_')}_not_found"
    return ServiceError(f"{what} {name!r:.80}", f"a {what} that exists", hint, status=404, code=code, param="id")


def printable(text: str) -> str:
    """A text from outside as UTF-8 and databases can hold it: without NUL and halves of characters."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def error_body(
    message: str, status: int, code: str | None = None, param: str | None = None, problems: Sequence[str] = ()
) -> dict[str, Any]:
    """The body of an error's answer; `problems`, where there are several, is this service's own field."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error: dict[str, Any] = {
        "message": printable(message),
        "type": kind,
        "param": None if param is None else printable(param),
        "code": code,
    }
    return {"error": {**error, "problems": [printable(line) for line in problems]} if problems else error}


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of a route in OpenAI's shape; what is not expected is logged and answered with 500."""

    @app.exception_handler(ServiceError)
    def _service(request: Request, error: ServiceError) -> JSONResponse:
        body = error_body(str(error), error.status, error.code, error.param, error.problems)
        return JSONResponse(body, error.status, error.headers)

    @app.exception_handler(LoraEmbedError)
    def _package(request: Request, error: LoraEmbedError) -> JSONResponse:
        services = getattr(request.app.state, "services", None)
        public = str if services is None else services.settings.without_folders
        problems = [public(problem) for problem in error.problems]
        return JSONResponse(error_body(public(str(error)), 400, "invalid_request", None, problems), 400)

    @app.exception_handler(RequestValidationError)
    def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [_problem(item) for item in error.errors()]
        message = f"{len(problems)} wrong value(s) in the request: " + "; ".join(problems[:20])
        first = problems[0].partition(":")[0] if problems else None
        return JSONResponse(error_body(message, 400, "invalid_request", first, problems), 400)

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code, error.headers)

    @app.exception_handler(TimeoutError)
    @app.exception_handler(OperationalError)
    def _database(request: Request, error: OperationalError | TimeoutError) -> JSONResponse:
        logger.error("the database refused: %s", error)
        message = "The database cannot be used at the moment (busy, not reachable, or its disk is full); try again."
        return JSONResponse(error_body(message, 503, "database_unavailable"), 503, {"Retry-After": "1"})

    @app.exception_handler(Exception)
    def _unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after the answer, so that the server logs it
        return JSONResponse(error_body("The server failed; its log says why.", 500, "internal_error"), 500)


def _problem(item: dict[str, Any]) -> str:
    """A line for one of pydantic's errors: the field by its path, and what was expected; the value is not repeated."""
    place = ".".join(str(part) for part in item["loc"] if part not in ("body", "query", "path", "header"))
    return f"{place or 'body'}: {item['msg']}"
