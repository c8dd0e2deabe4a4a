"""Evaluations and comparisons as tables: rich ones for a terminal, Markdown for a pull request."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.evaluation.compare import written
from llama_index_lora_embed.evaluation.metrics import HEADLINE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from llama_index_lora_embed.evaluation.pairs import PairEvaluation
    from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation
    from llama_index_lora_embed.evaluation.retrieval_comparison import Difference, QueryOutcome, RetrievalComparison

_WIDTH = 90  # characters of a text in a cell
_NARROW = 40  # the same on a terminal
_QUERIES = 5


@dataclass(frozen=True)
class Table:
    """Rows of text under a title.

    Attributes:
        title: What it shows.
        columns: Their names; the first is set to the left, the others to the right unless they are texts.
        rows: As many cells each as there are columns.
        texts: Names of the columns that hold texts.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    texts: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """A Markdown table under its title in bold."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(_as_text(" ".join(cell.split())) for cell in cells) + " |"

        marks = ["---" if self._left(name) else "---:" for name in self.columns]
        return "\n".join([f"**{_as_text(self.title)}**", "", line(self.columns), line(marks), *map(line, self.rows)])

    def to_rich(self) -> RichTable:
        """The table as rich prints it.

        Raises:
            MissingExtraError: rich is not installed.
        """
        text = require("rich.text").Text  # or rich would read "[a]" in a query as a style
        table: RichTable = require("rich.table").Table(title=text(self.title), title_justify="left")
        for name in self.columns:
            side: Any = "left" if self._left(name) else "right"
            table.add_column(text(name), justify=side, no_wrap=not self._left(name))
        for row in self.rows:
            table.add_row(*(text(" ".join(cell.split())) for cell in row))
        return table

    def _left(self, name: str) -> bool:
        return name == self.columns[0] or name in self.texts


def metrics_table(evaluations: Mapping[str, RetrievalEvaluation | PairEvaluation]) -> Table:
    """Any number of models side by side: a row for each, a column for each measure that all of them have.

    Args:
        evaluations: Name to evaluation.

    Raises:
        ConfigError: There are none.
    """
    if not evaluations:
        raise ConfigError("no evaluations", "one or more by name", 'metrics_table({"base": evaluation})')
    shared = [n for n in next(iter(evaluations.values())).metrics if all(n in e.metrics for e in evaluations.values())]
    rows = [(name, *(f"{e.metrics[n]:.3f}" for n in shared)) for name, e in evaluations.items()]
    return Table("Measures", ("", *map(written, shared)), rows)


def comparison_tables(comparison: RetrievalComparison, *, queries: int = _QUERIES, width: int = _WIDTH) -> list[Table]:
    """Measures, slices, and the queries most won and most lost.

    Args:
        comparison: Of two models.
        queries: How many of the won and of the lost ones.
        width: Characters of a text in a cell.
    """
    base, tuned = comparison.names
    columns = (base, tuned, "difference", "95 % interval", "won", "lost", "sign test p")
    order = [*HEADLINE, *(n for n in comparison.measures if n not in HEADLINE)]
    tables = [
        Table(
            f"{base} against {tuned}, {comparison.comparison.queries} queries",
            ("measure", *columns),
            [(written(n), *_cells(comparison.measures[n])) for n in order if n in comparison.measures],
        )
    ]
    if comparison.regression_set is not None:
        regression_set = comparison.regression_set
        row = (f"nDCG@10 of {regression_set.queries} general queries", *_cells(regression_set.measured))
        tables.append(
            Table(f"Regression set: {'alive' if regression_set.alive else 'DEAD'}", ("measure", *columns), [row])
        )
    if comparison.slices:
        rows = [(f"{s.by}: {s.name}", str(s.queries), *_cells(s.measured)) for s in comparison.slices]
        tables.append(Table("nDCG@10 by slice", ("slice", "queries", *columns), rows))
    for title, outcomes in (("Queries won", comparison.won), ("Queries lost", comparison.lost)):
        if outcomes[:queries]:
            head = ("query", f"{base} nDCG@10", f"{tuned} nDCG@10", f"{base} found first", f"{tuned} found first")
            body = [_outcome_cells(outcome, comparison, width) for outcome in outcomes[:queries]]
            tables.append(Table(f"{title}: {len(outcomes)}", head, body, texts=(head[3], head[4])))
    return tables


def to_markdown(comparison: RetrievalComparison, *, queries: int = _QUERIES) -> str:
    """Verdict, notes and tables as Markdown, for a pull request.

    Args:
        comparison: Of two models.
        queries: How many of the won and of the lost queries.
    """
    parts = [f"**{comparison.verdict.value}**: {str(comparison).partition(': ')[2]}"]
    if comparison.notes:
        parts.append("\n".join(f"- {note}" for note in comparison.notes))
    return (
        "\n\n".join([*parts, *(table.to_markdown() for table in comparison_tables(comparison, queries=queries))]) + "\n"
    )


def print_comparison(
    comparison: RetrievalComparison, *, queries: int = _QUERIES, console: Console | None = None
) -> None:
    """Verdict, notes and tables on a terminal.

    Args:
        comparison: Of two models.
        queries: How many of the won and of the lost queries.
        console: rich's; None for the terminal.

    Raises:
        MissingExtraError: rich is not installed.
    """
    out = console or require("rich.console").Console()
    out.print(str(comparison), markup=False, highlight=False)
    for note in comparison.notes:
        out.print(f"- {note}", markup=False, highlight=False)
    for table in comparison_tables(comparison, queries=queries, width=_NARROW):
        out.print()
        out.print(table.to_rich())


def _cells(measured: Difference) -> tuple[str, ...]:
    low, high = measured.interval
    return (
        f"{measured.base:.3f}",
        f"{measured.tuned:.3f}",
        f"{measured.difference:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        str(measured.won),
        str(measured.lost),
        f"{measured.p_value:.3f}" if measured.p_value >= 0.001 else "< 0.001",
    )


def _outcome_cells(outcome: QueryOutcome, comparison: RetrievalComparison, width: int) -> tuple[str, ...]:
    def first(found: tuple[str, ...]) -> str:
        if not found:
            return "nothing"
        mark = "right: " if found[0] in outcome.relevant else "wrong: "
        return mark + shortened(comparison.dataset.corpus.get(found[0], found[0]), width)

    return (
        shortened(outcome.text, width),
        f"{outcome.base:.3f}",
        f"{outcome.tuned:.3f}",
        first(outcome.base_found),
        first(outcome.tuned_found),
    )


def _as_text(text: str) -> str:
    """Markdown that shows these very characters: no markup of whoever wrote a query."""
    return re.sub(r"([\\|`*_\[\]~])", r"\\\1", html.escape(text, quote=False))


def shortened(text: Any, width: int = _WIDTH) -> str:
    """The first words of a text, on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"
