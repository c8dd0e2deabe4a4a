"""The database: one engine for SQLite and PostgreSQL, with a transaction for reading and one for writing.

Tables are SQLModel classes in the module that owns them; `Database.create_tables` makes those that were imported.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.exc import ArgumentError
from sqlmodel import Session, SQLModel

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.core.optional import require

_BUSY_S = 30  # a writer waits so long for others; each holds the lock for milliseconds
_ALPHABET = string.ascii_letters + string.digits
_WRITE = "lora_embed_write"
_LOCKS = {"tables": 0x10AE, "create": 0x10AF}  # any numbers that are ours


def new_id(prefix: str) -> str:
    """A random id such as "ftjob-" and 24 letters and digits (143 bits), which cannot be guessed."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def lock(connection: Connection | Session, what: Literal["tables", "create"]) -> None:
    """Wait until no other writing transaction holds this lock, and hold it until the end of this one.

    On SQLite a writing transaction keeps all others out anyway.
    """
    bound = connection.get_bind() if isinstance(connection, Session) else connection
    if bound.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LOCKS[what])))


def is_id(text: str) -> bool:
    """Whether a text from outside can be an id; others are not even looked for."""
    return 0 < len(text) <= 64 and text.isascii() and text.replace("-", "").isalnum()


def select_page(
    query: Any, created: Any, row_id: Any, last: tuple[float, str] | None, limit: int, *, oldest_first: bool = False
) -> Any:
    """The rows of a query after the last one of the page before, by time and id; one more than the page holds.

    Args:
        query: The rows.
        created: Column of the time.
        row_id: Column of the id.
        last: Time and id of the last row of the page before; None for the first page.
        limit: Length of the page.
        oldest_first: Instead of newest first.
    """
    if last is not None:
        beyond = created > last[0] if oldest_first else created < last[0]
        same = row_id > last[1] if oldest_first else row_id < last[1]
        query = query.where(beyond | ((created == last[0]) & same))
    ordered = (created, row_id) if oldest_first else (created.desc(), row_id.desc())
    return query.order_by(*ordered).limit(limit + 1)


class Database:
    """Sessions on a database.

    On SQLite a writing transaction begins with BEGIN IMMEDIATE, so that what it has read stays true until it writes;
    on PostgreSQL a row is locked with `select(...).with_for_update()`, which SQLite leaves out.

    Args:
        url: SQLAlchemy's URL of a SQLite or PostgreSQL database; `postgresql://` is taken with psycopg 3.

    Raises:
        ConfigError: The URL is of another database, or none.
    """

    def __init__(self, url: str) -> None:
        if url.startswith(("postgresql://", "postgres://")):
            url = "postgresql+psycopg://" + url.partition("://")[2]
        kind = url.partition(":")[0].partition("+")[0]
        try:
            if kind not in ("sqlite", "postgresql"):
                raise ArgumentError(f"no support for {kind!r}")
            if kind == "postgresql":
                require("psycopg")
            options: dict[str, Any] = {"pool_pre_ping": True}
            if kind == "sqlite":
                options = {"connect_args": {"timeout": _BUSY_S}}
            # more than the threads that FastAPI runs routes in
            self.engine: Engine = create_engine(url, pool_size=20, max_overflow=40, **options)
        except ArgumentError as error:
            raise ConfigError(
                f"a database_url that cannot be used ({error})",
                "sqlite:///<file> or postgresql+psycopg://<user>:<password>@<host>/<name>",
                "Correct LORA_EMBED_DATABASE_URL.",
            ) from None
        if kind == "sqlite":
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    def create_tables(self) -> None:
        """Create the tables that do not exist."""
        with self.engine.connect().execution_options(**{_WRITE: True}) as connection, connection.begin():
            lock(connection, "tables")  # or processes that start together would both create them
            SQLModel.metadata.create_all(connection)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in a writing transaction, which is committed at the end of the block unless it raises."""
        with (
            self.engine.connect().execution_options(**{_WRITE: True}) as connection,
            Session(connection, expire_on_commit=False) as session,
        ):
            yield session
            session.commit()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would come at the first write, after the reading
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # an accepted job survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get(_WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
