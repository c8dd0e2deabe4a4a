"""`token`: the API tokens of the service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated

import typer

from llama_index_lora_embed.cli.command import MARKUP, Outcome, command

if TYPE_CHECKING:
    from llama_index_lora_embed.service.security import ApiToken, Tokens


@dataclass(frozen=True)
class TokenShown:
    """A token as the commands show it; its text is known when it is made, and never again."""

    id: str
    name: str
    scopes: list[str]
    created: str
    revoked: str | None
    token: str | None = None


def register(app: typer.Typer) -> None:
    """Add the group to the application."""
    group = typer.Typer(
        name="token",
        help="API tokens of the service, in its data folder.",
        no_args_is_help=True,
        rich_markup_mode=MARKUP,
    )
    command(
        group,
        'lora-embed token create "indexing job" --scope embed',
        "lora-embed token create laptop --scope train --scope read --scope embed",
    )(create)
    command(group, "lora-embed token list", "lora-embed token list --json", name="list")(list_tokens)
    command(group)(revoke)
    app.add_typer(group)


def create(
    name: Annotated[str, typer.Argument(help="Who uses the token.")],
    *,
    scope: Annotated[list[str], typer.Option(help="What it may do: train, read, embed or admin; once for each.")],
) -> Outcome:
    """Make a token, and print it this once: the service keeps its hash alone.

    The service's folder and database are those of the environment: LORA_EMBED_DATA_DIR, LORA_EMBED_DATABASE_URL.
    """
    with _tokens() as tokens:
        row, secret = tokens.create(name, scope)
    note = f"{row.id}: keep the token in a safe place; it cannot be shown again."
    return Outcome(_shown(row, secret), secret, notes=(note,))


def list_tokens() -> Outcome:
    """List the tokens, without their texts."""
    with _tokens() as tokens:
        rows = [_shown(row) for row in tokens.list()]
    lines = [f"{row.id}  {row.name}  {','.join(row.scopes)}  {'revoked' if row.revoked else 'valid'}" for row in rows]
    return Outcome(rows, "\n".join(lines) or "no tokens yet")


def revoke(token: Annotated[str, typer.Argument(help="The token's id, as `list` shows it.")]) -> Outcome:
    """Refuse a token from now on. Its jobs go on."""
    with _tokens() as tokens:
        tokens.revoke(token)
    return Outcome({"id": token, "revoked": True}, f"{token} is refused from now on.")


@contextmanager
def _tokens() -> Iterator[Tokens]:
    """The tokens of the service that the environment names."""
    from llama_index_lora_embed.service.services import Services
    from llama_index_lora_embed.service.settings import ServiceSettings

    with Services(ServiceSettings()) as services:
        yield services.tokens


def _shown(row: ApiToken, secret: str | None = None) -> TokenShown:
    revoked = None if row.revoked is None else _moment(row.revoked)
    return TokenShown(row.id, row.name, row.scopes.split(), _moment(row.created), revoked, secret)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
