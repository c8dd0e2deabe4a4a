"""What a request may be: size and speed of its body, the rate of its token, JSON that all of the service can read."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, NoReturn

import anyio
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_index_lora_embed.service.errors import ServiceError, error_body
from llama_index_lora_embed.service.security import caller_of

_FORM_BYTES = 2**16  # what a multipart form adds to the file in it
_SLOWEST = 1000  # bytes per second that a body must come with, after the first seconds
_DRAINED = 2**24  # bytes of a refused body that are read, so that clients that send it all see the answer
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Rates:
    """A token bucket for each caller: `per_minute` requests at once, and as many more each minute.

    Args:
        per_minute: Requests of a caller.
        clock: Seconds, for tests.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # caller to what is left, and when that was so

    def take(self, caller: str) -> None:
        """Count a request.

        Raises:
            ServiceError: 429 with `Retry-After`; the caller has sent too many.
        """
        with self._lock:
            now, rate = self._clock(), self._per_minute / 60
            left, then = self._buckets.get(caller, (float(self._per_minute), now))
            left = min(float(self._per_minute), left + (now - then) * rate)
            self._buckets[caller] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            raise ServiceError(
                "too many requests",
                f"at most {self._per_minute} per minute",
                "Wait, and send several texts in one request.",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": str(math.ceil((1 - left) / rate))},
            )


class BodyLimit:
    """Middleware that refuses bodies that are too large, by their header or while they arrive, compressed, or too slow.

    It also refuses addresses with a zero byte, which PostgreSQL cannot look up.

    Args:
        app: The next ASGI application.
        max_bytes: Of a body.
        patience_s: Seconds in which a body has to arrive, and one more for each 1,000 bytes of it.
        larger: Path to the largest body of POST requests to it, for uploads.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, patience_s: float, larger: Mapping[str, int]) -> None:
        self._app = app
        self._patience_s = patience_s
        self._max_bytes = max_bytes
        self._larger = larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 404, 408, 413 or 415, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_bytes
        if scope["method"] == "POST" and scope["path"] in self._larger:
            limit = self._larger[scope["path"]] + _FORM_BYTES
        began, seen, unread, started = time.monotonic(), 0, True, False

        async def timed_receive() -> Message:
            nonlocal seen, unread
            if not unread:  # what comes then is the end of the connection, which may take its time
                return await receive()
            try:
                with anyio.fail_after(began + self._patience_s + seen / _SLOWEST - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                unread = False
                raise self._too_slow() from None
            seen += len(message.get("body", b""))
            unread = bool(message.get("more_body"))
            return message

        async def limited_receive() -> Message:
            message = await timed_receive()
            if seen > limit:
                raise _too_large(limit)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if (refused := _refusal(scope, limit)) is not None:
                raise refused
            await self._app(scope, limited_receive, watched_send)
        except _Refused as refused:
            if started:
                return
            with suppress(_Refused):
                if unread:
                    await _drain(timed_receive)
            answer = JSONResponse(error_body(*refused.error), refused.error[1], {"Connection": "close"})
            await answer(scope, receive, send)

    def _too_slow(self) -> _Refused:
        message = (
            f"The body has not arrived within {self._patience_s:g} s, and one more for each {_SLOWEST} bytes of it."
        )
        return _Refused(message, 408, "body_too_slow")


class _Refused(BaseException):
    """Not an `Exception`, which FastAPI would turn into an answer of its own while it reads a body.

    Attributes:
        error: Message, status and code.
    """

    def __init__(self, message: str, status: int, code: str) -> None:
        self.error = (message, status, code)


def _too_large(limit: int) -> _Refused:
    message = f"The body is larger than {limit} bytes, the most that this service reads here."
    return _Refused(message, 413, "body_too_large")


def _refusal(scope: Scope, limit: int) -> _Refused | None:
    """What address and headers say already."""
    if "\0" in scope["path"] or b"%00" in scope["query_string"]:
        return _Refused("Nothing is at an address with a zero byte.", 404, "not_found")
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        message = "Compressed bodies are not read; send the body as it is, without Content-Encoding."
        return _Refused(message, 415, "unsupported_encoding")
    length = headers.get(b"content-length", b"")
    return _too_large(limit) if length.isdigit() and int(length[:20]) > limit else None


async def _drain(receive: Receive) -> None:
    """Read the rest of a refused body, up to a limit."""
    drained, unread = 0, True
    while unread and drained < _DRAINED:
        part = await receive()
        drained += len(part.get("body", b"")) + 1
        unread = bool(part.get("more_body"))


class StrictRoute(APIRoute):
    """A route for callers with a token, whose JSON is read by `strict_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with a request of `_StrictRequest`; a body of a stranger is not stored."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if request.method == "POST":  # others have no body, and their callers are looked up as a dependency
                try:
                    await caller_of(request)
                except ServiceError:
                    await _drain(request.receive)
                    raise
            try:
                return await handler(_StrictRequest(request.scope, request.receive))
            except HTTPException as error:  # FastAPI's, for whatever goes wrong while it reads a body
                if isinstance(error.__cause__, ServiceError):
                    raise error.__cause__ from None
                raise

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = strict_json(await self.body())
        return self._json


def strict_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ServiceError: 400 for other encodings, what is not JSON (NaN, Infinity, numbers beyond a double), objects that
            are nested too deeply, and halves of surrogate pairs, which cannot be stored as UTF-8.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_not_finite, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise _not_json("nested too deeply") from None
    except UnicodeError as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "half of a surrogate pair"
        raise _not_json(reason) from None
    except ValueError as error:
        raise _not_json(str(error)) from None
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        _not_finite(digits)
    return value


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"{name:.40} is not a number of JSON")


def _not_json(reason: str) -> ServiceError:
    return ServiceError(
        f"a body that is not JSON ({reason:.200})", "JSON in UTF-8", "Send what json.dumps makes.", code="invalid_json"
    )
