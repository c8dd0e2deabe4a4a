"""Who calls, and what they may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastapi import Request

from llama_index_lora_embed.service.errors import ServiceError

Scope = Literal["train", "read", "embed", "admin"]
SCOPES: frozenset[Scope] = frozenset(("train", "read", "embed", "admin"))


@dataclass(frozen=True)
class Caller:
    """Who sends a request.

    Attributes:
        id: Id of the token.
        scopes: What it may do.
    """

    id: str
    scopes: frozenset[Scope]

    @property
    def owner(self) -> str | None:
        """The owner to look for in stores: the token's id, or None where the scope admin sees everything."""
        return None if "admin" in self.scopes else self.id


LOCAL = Caller("local", SCOPES)
"""Everybody, where `auth` is off."""


def require(scope: Scope) -> Callable[[Request], Caller]:
    """A dependency of routes: the caller, who must have a scope.

    Example:
        >>> @router.get("/v1/things")  # doctest: +SKIP
        ... def things(caller: Annotated[Caller, Depends(require("read"))]) -> list[str]: ...

    Raises:
        ServiceError: 401, there is no valid token; 403, it does not have the scope.
    """

    def dependency(request: Request) -> Caller:
        if request.app.state.services.settings.auth == "off":
            return LOCAL
        raise ServiceError(
            "a request without a valid token",
            "a header 'Authorization: Bearer <token>'",
            "Ask the operator of the service for a token.",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    return dependency
