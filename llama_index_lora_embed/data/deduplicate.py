"""Near-duplicates of a corpus that does not fit into memory: files in, the same files without later copies out."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_index_lora_embed.config import NEAR_DUPLICATE
from llama_index_lora_embed.core.errors import DatasetError, OutputDirectoryError
from llama_index_lora_embed.core.files import replace_directory, staging_beside
from llama_index_lora_embed.core.scratch import ScratchTexts
from llama_index_lora_embed.data.near_duplicates import check_threshold, first_alike
from llama_index_lora_embed.data.questions.base import embed_text
from llama_index_lora_embed.data.readers.parts import Part, Source, part_lines, part_table, plan_parts, read_part

_PART_BYTES = 1 << 24
_SHOWN = 20
_DROPPED = "dropped.csv"


@dataclass(frozen=True)
class NearDuplicatesReport:
    """What became of the rows of an input.

    Attributes:
        path: Folder of the files that were written.
        rows: Rows read.
        dropped: Rows left out, because an earlier one has the same text or nearly so.
        failed: Rows without an id or a text. They are kept.
        problems: The first twenty of these.
        examples: The first twenty of those left out, each with the id of the row that was kept.
    """

    path: str
    rows: int
    dropped: int
    failed: int
    problems: list[str] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.dropped} of {self.rows} rows repeat an earlier one and are not in {self.path!r}; {self.failed} had "
            "no id or text and were kept"
        ]
        return "\n".join([*lines, *(f"  {copy!r} of {first!r}" for copy, first in self.examples), *self.problems])


def drop_near_duplicates(
    source: Source,
    output: str | os.PathLike[str],
    threshold: float = NEAR_DUPLICATE,
    *,
    id_column: str | None = None,
    text_column: str | None = None,
    part_bytes: int = _PART_BYTES,
) -> NearDuplicatesReport:
    """Copy JSONL or Parquet files without the rows whose text repeats that of an earlier row, or nearly so.

    Rows are compared as in `near_duplicate_groups`, by the text that indexing embeds. What is kept of the input is
    unchanged: lines as they are, and all columns of tables. Memory is about 100 bytes for each row; the texts and 700
    bytes for each are in temporary files beside the output while this runs. The output appears whole or not at all.

    Args:
        source: A `.jsonl` or `.parquet` file, a folder of them, or several, as `distributed.embed_dataset` takes them.
        output: A new or empty folder on a disk. In the order of their names, its files have the rows in the order of
            the input. `dropped.csv` has the id of each row that was left out, and that of the row that it repeats.
        threshold: Jaccard index from which two texts count as the same, above 0 and at most 1.
        id_column: Of tables; None for "id", "_id" or "node_id".
        text_column: Of tables; None for "text", "passage" or "content".
        part_bytes: Bytes of the input that are read at once, and become one file.

    Raises:
        ConfigError: `threshold` is not above 0 and at most 1.
        DatasetError: The source does not exist, or has not one row with an id and a text.
        OutputDirectoryError: The output cannot be written, or is not empty.
    """
    check_threshold(threshold)
    target = Path(output).expanduser().absolute()
    _check_new(target)
    parts = plan_parts(source, part_bytes)
    sizes, problems, readable = [], list[str](), bytearray()
    with ScratchTexts(target.parent) as texts, ScratchTexts(target.parent) as ids:
        for part in parts:
            before = len(readable)
            for row in read_part(part, id_column, text_column):
                readable.append(row.node is not None)
                ids.append(row.id)
                if row.node is not None:
                    texts.append(embed_text(row.node))
                elif len(problems) < _SHOWN:
                    problems.append(f"{row.id}: {row.error}")
            sizes.append(len(readable) - before)
        if not len(texts):
            raise DatasetError(
                f"{len(readable)} rows, of which none can be read", "rows with an id and a text", "Correct:", problems
            )
        number_of = np.flatnonzero(np.frombuffer(readable, dtype=bool))
        firsts = np.arange(len(readable))
        firsts[number_of] = number_of[first_alike(len(texts), lambda i: ("", texts[i]), threshold, None, target.parent)]
        keep = firsts == np.arange(len(readable))
        dropped = np.flatnonzero(~keep)
        pairs = ((ids[number], ids[int(firsts[number])]) for number in map(int, dropped))
        examples = _write(target, parts, np.split(keep, np.cumsum(sizes)[:-1]), pairs)
    return NearDuplicatesReport(
        str(target), len(readable), len(dropped), len(readable) - len(number_of), problems, examples
    )


def _check_new(target: Path) -> None:
    """Raise an `OutputDirectoryError` unless a folder is new or empty; its parent is made."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = next(target.iterdir(), None) if target.exists() else None
    except OSError as error:
        raise _unwritable(target, error) from error
    if found is not None:
        raise OutputDirectoryError(
            f"{str(target)!r}, which holds {found.name!r}", "a new or empty folder", "Choose another one."
        )


def _unwritable(target: Path, error: OSError) -> OutputDirectoryError:
    return OutputDirectoryError(
        f"{str(target)!r}, which cannot be written: {error}",
        "a folder on a disk with room for a copy of the input",
        "Free some space, or choose another folder.",
    )


def _write(
    target: Path, parts: Iterable[Part], keep: Iterable[NDArray[np.bool_]], dropped: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Write the kept rows of each part, and the list of the dropped ones, of which the first are returned."""
    examples = list[tuple[str, str]]()
    try:
        with staging_beside(target) as staging:
            for part, kept in zip(parts, keep, strict=True):
                _write_part(part, kept, staging / f"part-{part.number:08}{Path(part.path).suffix}")
            with open(staging / _DROPPED, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["dropped", "kept"])
                for pair in dropped:
                    writer.writerow(pair)
                    if len(examples) < _SHOWN:
                        examples.append(pair)
            replace_directory(staging, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    return examples


def _write_part(part: Part, kept: NDArray[np.bool_], path: Path) -> None:
    if part.is_table:
        from pyarrow.parquet import write_table

        write_table(part_table(part).filter(kept), path, compression="zstd")
    else:
        with open(path, "wb") as file:
            lines = zip(part_lines(part), kept, strict=True)
            file.writelines(line.rstrip(b"\r\n") + b"\n" for (_, line), wanted in lines if wanted)
