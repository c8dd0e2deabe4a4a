"""The server's connections: a client that sends no request, or never the end of its headers, is cut off."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_BYTES = 2**16  # of address and headers


class TimedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which limits the time and the bytes until the headers of a request are complete.

    uvicorn has no such limits. Bodies are limited by `limits.BodyLimit`; a client that reads an answer slowly holds it
    back, because uvicorn waits when 64 KiB are unsent.

    Args:
        timeout_s: Seconds.
        arguments: uvicorn's.
    """

    def __init__(self, *arguments: Any, timeout_s: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timeout_s = timeout_s
        self._waiting: asyncio.TimerHandle | None = None
        self._unfinished = 0  # bytes of the headers so far

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        super().data_received(data)
        if self._waiting is not None:
            self._unfinished += len(data)
            if self._unfinished > _MOST_BYTES and not self.transport.is_closing():
                self.send_400_response(f"Address and headers have more than {_MOST_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """Begin the headers of a request."""
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        """Begin the request."""
        self._wait_no_more()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._wait_no_more()
        self._waiting = self.loop.call_later(self._timeout_s, self.timeout_keep_alive_handler)  # which closes it

    def _wait_no_more(self) -> None:
        self._unfinished = 0
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def timed_protocol(timeout_s: float) -> Any:
    """`TimedProtocol` with this time, as `uvicorn.Config(http=...)` takes it."""
    return partial(TimedProtocol, timeout_s=timeout_s)
