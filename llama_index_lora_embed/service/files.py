"""Uploaded files: on disk under random ids, never under a name of the request."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from sqlmodel import Field, SQLModel, col, select

from llama_index_lora_embed.core.files import whole_file
from llama_index_lora_embed.service.database import Database, is_id, new_id, select_page
from llama_index_lora_embed.service.errors import ServiceError, not_found, printable
from llama_index_lora_embed.service.settings import ServiceSettings


class FileRow(SQLModel, table=True):
    """An uploaded file."""

    __tablename__ = "file"

    id: str = Field(primary_key=True, max_length=64)
    owner: str = Field(index=True)
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created: float = Field(index=True)


class FileStore:
    """The uploaded files of the service.

    Example:
        >>> files = FileStore(Database("sqlite://"), ServiceSettings())  # doctest: +SKIP
        >>> row = files.add([b"{}"], "train.jsonl", owner="t1")  # doctest: +SKIP
        >>> files.path(row).read_bytes()  # doctest: +SKIP
        b'{}'

    Args:
        database: Where the table is created.
        settings: Of the service.
    """

    def __init__(self, database: Database, settings: ServiceSettings) -> None:
        self.database = database
        self.settings = settings
        settings.files_dir.mkdir(parents=True, exist_ok=True)
        database.create_tables()

    def add(self, chunks: Iterable[bytes], filename: str, *, owner: str, purpose: str = "fine-tune") -> FileRow:
        """Store a file.

        Args:
            chunks: Its content.
            filename: What the client calls it; shown again, and used for nothing else.
            owner: Id of the token that uploads it.
            purpose: What it is for.

        Raises:
            ServiceError: 400, it is larger than `max_upload_bytes`; 507, the disk is full.
        """
        file_id, size, digest = new_id("file-"), 0, hashlib.sha256()
        limit = self.settings.max_upload_bytes
        try:
            with whole_file(self._place(file_id), "wb") as file:
                for chunk in chunks:
                    size += len(chunk)
                    if size > limit:
                        raise ServiceError(
                            f"a file of more than {limit} bytes",
                            f"at most {limit}",
                            "Split it, or leave texts out.",
                            code="file_too_large",
                            param="file",
                        )
                    digest.update(chunk)
                    file.write(chunk)
        except OSError as error:
            raise disk_error(error) from error
        row = FileRow(
            id=file_id,
            owner=owner,
            filename=printable(filename)[:255],
            purpose=purpose,
            bytes=size,
            sha256=digest.hexdigest(),
            created=time.time(),
        )
        with self.database.write() as session:
            session.add(row)
        return row

    def get(self, file_id: str, owner: str | None = None) -> FileRow:
        """A file's row.

        Args:
            file_id: Its id.
            owner: The token that asks; None for one that may see all files.

        Raises:
            ServiceError: 404, there is no such file, or it belongs to another owner.
        """
        with self.database.read() as session:
            row = session.get(FileRow, file_id) if is_id(file_id) else None
        if row is None or owner not in (None, row.owner):
            raise not_found("file", file_id, "GET /v1/files lists your files.")
        return row

    def list(
        self,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 10_000,
        purpose: str | None = None,
        oldest_first: bool = False,
    ) -> tuple[list[FileRow], bool]:
        """Files, newest first unless `oldest_first`, and whether there are more; arguments as `JobStore.list`."""
        query = select(FileRow)
        if owner is not None:
            query = query.where(FileRow.owner == owner)
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        last = None if after is None else self.get(after, owner)
        place = None if last is None else (last.created, last.id)
        query = select_page(query, col(FileRow.created), col(FileRow.id), place, limit, oldest_first=oldest_first)
        with self.database.read() as session:
            rows = session.exec(query).all()
        return list(rows[:limit]), len(rows) > limit

    def path(self, row: FileRow) -> Path:
        """Where the content is."""
        return self._place(row.id)

    def delete(self, file_id: str, owner: str | None = None) -> None:
        """Delete a file; jobs that were created with it have their copy.

        Raises:
            ServiceError: 404, as `get`.
        """
        row = self.get(file_id, owner)
        with self.database.write() as session:
            session.delete(row)
        with suppress(FileNotFoundError):
            self._place(row.id).unlink()

    def older_than(self, moment: float) -> Sequence[str]:
        """Ids of the files from before a moment."""
        with self.database.read() as session:
            return session.exec(select(FileRow.id).where(col(FileRow.created) < moment)).all()

    def _place(self, file_id: str) -> Path:
        return self.settings.files_dir / file_id  # an id from `new_id`, or of a row


def disk_error(error: OSError) -> ServiceError:
    """The error (507) for something that could not be written."""
    return ServiceError(
        f"a disk that refuses to be written ({error.strerror or type(error).__name__})",
        "free space in the service's data folder",
        "Tell the operator of the service; nothing was stored.",
        status=507,
        code="disk_full",
    )
