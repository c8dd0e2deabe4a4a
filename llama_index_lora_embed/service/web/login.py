"""Log in with an API token, and out again."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from starlette.responses import RedirectResponse

from llama_index_lora_embed.service.api.dependencies import ServicesOf
from llama_index_lora_embed.service.web.pages import FORM, PageRoute, render
from llama_index_lora_embed.service.web.session import SESSION, set_cookie, visitor

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_LOCAL = re.compile(r"/(?![/\\])[\w./?=&%:@+-]*", re.ASCII)  # a path of this service, not the address of another


@router.get("/login")
def login(request: Request, next: str = "/") -> Response:
    """The form."""
    if visitor(request) is not None:
        return RedirectResponse(_local(next), 303)
    return render(request, "login.html.j2", next=_local(next), wrong=False)


@router.post("/login", dependencies=FORM)
def log_in(
    request: Request, services: ServicesOf, token: Annotated[str, Form()] = "", next: Annotated[str, Form()] = "/"
) -> Response:
    """Keep the token in a cookie if it is valid."""
    if services.tokens.verify(token.strip()) is None:
        return render(request, "login.html.j2", 401, next=_local(next), wrong=True)
    response = RedirectResponse(_local(next), 303)
    set_cookie(request, response, SESSION, token.strip())
    return response


@router.post("/logout", dependencies=FORM)
def log_out(request: Request) -> Response:
    """Forget the token."""
    response = RedirectResponse("/login", 303)
    response.delete_cookie(SESSION, path="/", httponly=True, samesite="strict")
    return response


def _local(path: str) -> str:
    return path if _LOCAL.fullmatch(path) else "/"
