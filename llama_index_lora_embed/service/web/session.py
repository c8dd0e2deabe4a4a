"""Who uses the page: an API token in a cookie, and tokens in forms that no other site can know."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Form, Request, Response

from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.security import LOCAL, Caller, TokenScope, check_scope

SESSION = "lora-embed-session"
"""Cookie with the API token; it ends with the browser's session."""
VISIT = "lora-embed-visit"
"""Cookie with random bits that forms are bound to, also where nobody has logged in."""


class NotLoggedIn(ServiceError):
    """A page that asks for a token (401)."""

    def __init__(self) -> None:
        super().__init__(
            "a visitor who has not logged in", "an API token", "Log in.", status=401, code="invalid_api_key"
        )


def visitor(request: Request) -> Caller | None:
    """The caller whose token is in the cookie, which is looked up once; None without a valid one."""
    services = request.app.state.services
    if services.settings.auth == "off":
        return LOCAL
    if not hasattr(request.state, "visitor"):
        secret = request.cookies.get(SESSION)
        request.state.visitor = services.tokens.verify(secret) if secret else None
    found: Caller | None = request.state.visitor
    return found


def require_page(scope: TokenScope) -> Callable[[Request], Caller]:
    """As `security.require`, with the cookie instead of the header.

    Raises:
        NotLoggedIn: There is no valid token.
        ServiceError: 403, it does not have the scope; 429, too many requests.
    """

    def dependency(request: Request) -> Caller:
        caller = visitor(request)
        if caller is None:
            raise NotLoggedIn
        request.app.state.services.rates.take(caller.id)
        check_scope(caller, scope)
        return caller

    return dependency


def set_cookie(request: Request, response: Response, name: str, value: str) -> None:
    """Set a cookie that scripts cannot read and other sites cannot send."""
    secure = request.url.scheme == "https"
    response.set_cookie(name, value, httponly=True, samesite="strict", secure=secure, path="/")


def visit_of(request: Request) -> str:
    """The random bits of a visitor's cookie; new ones, which the answer has to set, where there is none."""
    if not hasattr(request.state, "visit"):
        request.state.visit = request.cookies.get(VISIT) or secrets.token_urlsafe(32)
    return str(request.state.visit)


def form_token(request: Request) -> str:
    """The hidden field of every form: it belongs to the visitor's two cookies, which another site cannot read."""
    key = f"{visit_of(request)} {request.cookies.get(SESSION, '')}"
    return hmac.new(key.encode("utf-8", "surrogatepass"), b"form", hashlib.sha256).hexdigest()


def check_form(request: Request, csrf: Annotated[str, Form()] = "") -> None:
    """A dependency of every route that changes something: the form is one of this page, sent from it.

    Raises:
        ServiceError: 403, it is not.
    """
    origin = request.headers.get("origin")
    elsewhere = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    fits = hmac.compare_digest(csrf.encode("utf-8", "surrogatepass"), form_token(request).encode())
    if elsewhere or VISIT not in request.cookies or not fits:
        raise ServiceError(
            "a form that is not from this page, or is from before you logged in",
            "a form of this page",
            "Open the page again, and send the form from there.",
            status=403,
            code="csrf",
        )
