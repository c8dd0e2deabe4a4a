"""API tokens and what they may do; who may talk to a service without tokens."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from fastapi import Request
from sqlmodel import Field, SQLModel, col, select
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.service.database import Database
from llama_index_lora_embed.service.errors import ServiceError, error_body

TokenScope = Literal["train", "read", "embed", "admin"]
SCOPES: tuple[TokenScope, ...] = get_args(TokenScope)
"""What a token may do: "train" creates and changes jobs, files and adapters, "read" reads them and lists models,
"embed" embeds and evaluates, and "admin" may do all of it, with what belongs to other tokens as well."""
_KNOWN_S = 1.0  # for which a token that was found is not looked up again
_MOST_KNOWN = 1000
_PREFIX = "lora-embed-"  # so that scanners of repositories find a token that was published by mistake


class ApiToken(SQLModel, table=True):
    """A row of the table of tokens; the token itself is not stored."""

    __tablename__ = "api_token"

    id: str = Field(primary_key=True)
    name: str
    sha256: str = Field(unique=True, index=True)
    scopes: str
    created: float
    revoked: float | None = None


@dataclass(frozen=True)
class Caller:
    """Who sends a request.

    Attributes:
        id: Of the token; "local" where the service asks for none. Jobs and files belong to it.
        scopes: What it may do.
    """

    id: str
    scopes: frozenset[TokenScope]

    @property
    def owner(self) -> str | None:
        """The owner to look for in stores: the token's id, or None where the scope admin sees everything."""
        return None if "admin" in self.scopes else self.id

    def may(self, scope: TokenScope) -> bool:
        """Whether it has a scope, or the scope admin."""
        return scope in self.scopes or "admin" in self.scopes


LOCAL = Caller("local", frozenset(SCOPES))
"""Everybody, where `auth` is off."""


class Tokens:
    """The table of API tokens.

    A token is 256 random bits and is stored as SHA-256. It cannot be guessed, so that a slow password hash would add
    nothing. Where it was found it is known for a second, which is how long one works on that another process revokes.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, tuple[Caller, float]] = {}  # by digest, with the time until when
        database.create_tables()

    def create(self, name: str, scopes: Sequence[str]) -> tuple[ApiToken, str]:
        """A new token: its row, and the token itself, which is shown this once.

        Raises:
            ConfigError: A scope is unknown, there is none, or the name is empty or longer than 100 characters.
        """
        unknown = sorted({*scopes} - {*SCOPES})
        if unknown or not scopes:
            raise ConfigError(
                f"scopes {', '.join(map(repr, unknown)) or 'that are empty'}",
                f"some of {', '.join(SCOPES)}",
                "train and read for jobs, embed for embeddings, admin for all.",
            )
        if not re.fullmatch(r"[^\x00-\x1f\x7f]{1,100}", name):
            raise ConfigError(f"name={name!r:.120}", "1 to 100 printable characters", "Say who uses the token.")
        secret = _PREFIX + secrets.token_urlsafe(32)
        row = ApiToken(
            id=f"token-{secrets.token_hex(6)}",
            name=name,
            sha256=_digest(secret),
            scopes=" ".join(scope for scope in SCOPES if scope in scopes),
            created=time.time(),
        )
        with self._database.write() as session:
            session.add(row)
        return row, secret

    def list(self) -> list[ApiToken]:
        """All tokens, oldest first, revoked ones included."""
        with self._database.read() as session:
            return [*session.exec(select(ApiToken).order_by(col(ApiToken.created)))]

    def revoke(self, token_id: str) -> None:
        """Refuse a token from now on; jobs that it created go on.

        Raises:
            ConfigError: There is no such token.
        """
        with self._database.write() as session:
            row = session.get(ApiToken, token_id)
            self._known.clear()
            if row is not None:
                row.revoked = row.revoked or time.time()
                session.add(row)
        if row is None:
            known = ", ".join(token.id for token in self.list()) or "none yet"
            raise ConfigError(f"token {token_id!r:.80}", f"one of: {known}", "lora-embed token list shows all.")

    def verify(self, secret: str) -> Caller | None:
        """Who a token belongs to; None if it is unknown or revoked.

        The row is found by the digest, which tells an attacker who measures times nothing about tokens.
        """
        if (known := self.recent(secret)) is not None:
            return known
        digest = _digest(secret)
        with self._database.read() as session:
            row = session.exec(select(ApiToken).where(ApiToken.sha256 == digest)).first()
        if row is None or row.revoked is not None or not hmac.compare_digest(row.sha256, digest):
            return None
        caller = Caller(row.id, frozenset(scope for scope in SCOPES if scope in row.scopes.split()))
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[digest] = caller, time.monotonic() + _KNOWN_S
        return caller

    def recent(self, secret: str) -> Caller | None:
        """Who a token belongs to that was verified within the last second, without asking the database."""
        caller, until = self._known.get(_digest(secret), (None, 0.0))
        return caller if time.monotonic() < until else None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def require(*scopes: TokenScope) -> Callable[[Request], Awaitable[Caller]]:
    """A dependency of routes: the caller, who must have one of these scopes, and has not sent too many requests.

    Example:
        >>> @router.get("/v1/things")  # doctest: +SKIP
        ... def things(caller: Annotated[Caller, Depends(require("read"))]) -> list[str]: ...

    Raises:
        ServiceError: 401, there is no valid token; 403, it has none of the scopes; 429, too many requests.
    """

    async def dependency(request: Request) -> Caller:
        caller = await caller_of(request)
        request.app.state.services.rates.take(caller.id)
        check_scope(caller, *scopes)
        return caller

    return dependency


async def caller_of(request: Request) -> Caller:
    """Who sends a request; the token is looked up once.

    Raises:
        ServiceError: 401, there is no valid token.
    """
    if not hasattr(request.state, "caller"):
        services = request.app.state.services
        known = LOCAL if services.settings.auth == "off" else await _authenticated(request, services.tokens)
        request.state.caller = known
    caller: Caller = request.state.caller
    return caller


def check_scope(caller: Caller, *scopes: TokenScope) -> None:
    """Raise `ServiceError` (403) for a caller with none of these scopes."""
    if not any(caller.may(scope) for scope in scopes):
        wanted = " or ".join(scopes)
        raise ServiceError(
            f"a token without the scope {wanted}",
            f"one with {wanted}",
            "The operator of the service can make one: lora-embed token create.",
            status=403,
            code="insufficient_scope",
        )


async def _authenticated(request: Request, tokens: Tokens) -> Caller:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    caller, secret = None, secret.strip()
    if kind.lower() == "bearer":
        caller = tokens.recent(secret) or await run_in_threadpool(tokens.verify, secret)
    if caller is None:
        raise ServiceError(
            "a wrong API token" if kind else "a request without an API token",
            "a header 'Authorization: Bearer <token>'",
            "Ask the operator of the service for a token; OpenAI's clients send their api_key.",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return caller


class LoopbackOnly:
    """Middleware of a service without tokens: requests of web pages from elsewhere are refused.

    A page that a user of this computer has open can send requests to loopback addresses, under the page's `Origin`, or
    under a `Host` that was made to resolve to loopback (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 403 unless `Host` and `Origin`, where there is one, are loopback."""
        if scope["type"] == "http":
            headers: dict[bytes, Any] = dict(scope["headers"])
            host = headers.get(b"host", b"").decode("latin-1")
            origin = headers.get(b"origin", b"").decode("latin-1")
            if not _is_loopback(f"//{host}") or (origin and not _is_loopback(origin)):
                message = "A service without tokens answers requests to and from this computer only."
                await JSONResponse(error_body(message, 403, "not_loopback"), 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
