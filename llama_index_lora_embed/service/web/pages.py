"""What all pages share: templates, headers, errors as pages, and the files that they load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from datetime import datetime, timezone
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse

from llama_index_lora_embed.core.errors import LoraEmbedError
from llama_index_lora_embed.service.errors import ServiceError
from llama_index_lora_embed.service.security import Caller
from llama_index_lora_embed.service.web.session import (
    VISIT,
    NotLoggedIn,
    check_form,
    form_token,
    require_page,
    set_cookie,
    visit_of,
    visitor,
)

if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

PageReader = Annotated[Caller, Depends(require_page("read"))]
"""A visitor who may see jobs and adapters."""
PageTrainer = Annotated[Caller, Depends(require_page("train"))]
"""A visitor who may create and change them."""
PageEmbedder = Annotated[Caller, Depends(require_page("embed"))]
"""A visitor who may embed and label."""
FORM = [Depends(check_form)]
"""Dependencies of every route that takes a form."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of all pages: nothing inline, and nothing from elsewhere."""
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # "no-referrer" would take the Origin from forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_STATIC = {
    "style.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "job.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class PageRoute(APIRoute):
    """A route whose errors are pages, and whose answers have the headers of pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with these errors and headers."""
        handler = super().get_route_handler()

        async def page(request: Request) -> Response:
            try:
                if request.method == "POST" and request.url.path != "/login":
                    await run_in_threadpool(_logged_in, request)  # before the body is read: it may be an upload
                response = await handler(request)
            except NotLoggedIn:
                response = _to_login(request)
            except (LoraEmbedError, RequestValidationError, HTTPException) as error:
                response = error_page(request, error)
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return page


router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/static/{name}")
def static(name: str) -> Response:
    """One of the files that pages load."""
    if name not in _STATIC:
        raise HTTPException(404, "There is no such file.")
    return Response(_file(name), media_type=_STATIC[name], headers={"Cache-Control": "max-age=300"})


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page from a template; all values are escaped.

    Args:
        request: Of the visitor, which decides the navigation.
        template: Name of a file in templates/.
        status: HTTP status.
        values: What the template shows.
    """
    caller = visitor(request)
    text = (
        _environment()
        .get_template(template)
        .render(
            csrf=form_token(request),
            caller=caller,
            may=caller.may if caller else lambda scope: False,
            login=request.app.state.services.settings.auth == "on",
            path=request.url.path,
            **values,
        )
    )
    response = HTMLResponse(text.encode("utf-8", "replace"), status)  # a lone surrogate is no reason to fail
    if VISIT not in request.cookies:
        set_cookie(request, response, VISIT, visit_of(request))
    return response


def redirect(request: Request, route: str, **path: str) -> RedirectResponse:
    """The answer to a form: the browser shows another page, which a reload does not send again."""
    return RedirectResponse(request.app.url_path_for(route, **path), 303)


def error_page(request: Request, error: Exception) -> HTMLResponse:
    """An error as a page."""
    status, message = status_of(error), request.app.state.services.settings.without_folders(str(error))
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        message = "The form is incomplete: " + "; ".join(str(item["loc"][-1]) for item in error.errors())
    return render(request, "error.html.j2", status, message=message)


def status_of(error: Exception) -> int:
    """The HTTP status of an error of the package: its own, or 400."""
    return error.status if isinstance(error, ServiceError) else 400


def problems_of(request: Request, error: LoraEmbedError | ValidationError) -> list[str]:
    """What a form shows of an error: each problem on a line, without folders of this machine."""
    if isinstance(error, ValidationError):
        return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    public = request.app.state.services.settings.without_folders
    return [public(line) for line in error.problems or [str(error)]]


def _logged_in(request: Request) -> None:
    if visitor(request) is None:
        raise NotLoggedIn


def _to_login(request: Request) -> Response:
    if request.method != "GET":
        return RedirectResponse("/login", 303)
    there = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"/login?next={quote(there, safe='')}", 303)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llama_index_lora_embed.service.web"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["moment"] = _moment
    return environment


@lru_cache(maxsize=len(_STATIC))
def _file(name: str) -> bytes:
    return (files("llama_index_lora_embed.service.web") / "static" / name).read_bytes()


def _moment(seconds: float | None) -> str:
    """A time for people."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
