"""Evaluations and comparisons as tables: rich tables for a terminal, Markdown for a pull request."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.evaluation.metrics import HEADLINE, metric_label

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from llama_index_lora_embed.evaluation.compare import Difference
    from llama_index_lora_embed.evaluation.pairs import PairEvaluation
    from llama_index_lora_embed.evaluation.retrieval import RetrievalEvaluation
    from llama_index_lora_embed.evaluation.retrieval_comparison import QueryOutcome, RetrievalComparison

_CELL_WIDTH = 90  # characters of a text in a cell
_TERMINAL_CELL_WIDTH = 40
_QUERIES = 5


@dataclass(frozen=True)
class Table:
    """Rows of cells under a title.

    Attributes:
        title: The title.
        columns: Names of the columns. The first one and those in `text_columns` are aligned left, the others right.
        rows: Cells, as many in each row as there are columns.
        text_columns: Names of the columns that hold texts.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """The table in Markdown, under its title in bold."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(_escape(" ".join(cell.split())) for cell in cells) + " |"

        marks = ["---" if self._aligned_left(name) else "---:" for name in self.columns]
        return "\n".join([f"**{_escape(self.title)}**", "", line(self.columns), line(marks), *map(line, self.rows)])

    def to_rich(self) -> RichTable:
        """The table for rich.

        Raises:
            MissingExtraError: rich is not installed.
        """
        text = require("rich.text").Text  # rich would read "[a]" in a query as a style
        table: RichTable = require("rich.table").Table(title=text(self.title), title_justify="left")
        for name in self.columns:
            left = self._aligned_left(name)
            table.add_column(text(name), justify="left" if left else "right", no_wrap=not left)
        for row in self.rows:
            table.add_row(*(text(" ".join(cell.split())) for cell in row))
        return table

    def _aligned_left(self, name: str) -> bool:
        return name == self.columns[0] or name in self.text_columns


def metrics_table(evaluations: Mapping[str, RetrievalEvaluation | PairEvaluation]) -> Table:
    """Any number of models by name: a row for each of them, a column for each metric that all of them have.

    Raises:
        ConfigError: There are no evaluations.
    """
    if not evaluations:
        raise ConfigError("no evaluations", "at least one, by name", 'metrics_table({"base": evaluation})')
    shared = [n for n in next(iter(evaluations.values())).metrics if all(n in e.metrics for e in evaluations.values())]
    rows = [(name, *(f"{e.metrics[n]:.3f}" for n in shared)) for name, e in evaluations.items()]
    return Table("Metrics", ("", *map(metric_label, shared)), rows)


def comparison_tables(
    comparison: RetrievalComparison, *, queries: int = _QUERIES, width: int = _CELL_WIDTH
) -> list[Table]:
    """Metrics, regression set, slices, and the queries that improved and degraded most; texts are cut at `width`."""
    base, tuned = comparison.names
    columns = (base, tuned, "difference", "95 % interval", "improved", "degraded", "sign test p")
    metrics = comparison.metrics
    order = [name for name in dict.fromkeys([*HEADLINE, *metrics]) if name in metrics]
    rows = [(metric_label(name), *_difference_cells(metrics[name])) for name in order]
    tables = [Table(f"{base} against {tuned}, {comparison.comparison.queries} queries", ("metric", *columns), rows)]
    if (check := comparison.regression_set) is not None:
        row = (f"nDCG@10 on {check.queries} queries", *_difference_cells(check.ndcg))
        title = f"Regression set: {'passed' if check.passed else 'FAILED'}"
        tables.append(Table(title, ("metric", *columns), [row]))
    if comparison.slices:
        rows = [(f"{s.by}: {s.name}", str(s.queries), *_difference_cells(s.ndcg)) for s in comparison.slices]
        tables.append(Table("nDCG@10 by slice", ("slice", "queries", *columns), rows))
    for title, outcomes in (("Improved queries", comparison.improved), ("Degraded queries", comparison.degraded)):
        if outcomes[:queries]:
            head = ("query", f"{base} nDCG@10", f"{tuned} nDCG@10", f"{base} ranked first", f"{tuned} ranked first")
            rows = [_query_cells(outcome, comparison, width) for outcome in outcomes[:queries]]
            tables.append(Table(f"{title}: {len(outcomes)}", head, rows, text_columns=head[3:]))
    return tables


def to_markdown(comparison: RetrievalComparison, *, queries: int = _QUERIES) -> str:
    """Verdict, notes and tables as Markdown for a pull request; at most `queries` improved and degraded queries."""
    verdict = comparison.verdict.value
    parts = [f"**{verdict}**{str(comparison).removeprefix(verdict)}"]
    if comparison.notes:
        parts.append("\n".join(f"- {note}" for note in comparison.notes))
    parts += [table.to_markdown() for table in comparison_tables(comparison, queries=queries)]
    return "\n\n".join(parts) + "\n"


def print_comparison(
    comparison: RetrievalComparison, *, queries: int = _QUERIES, console: Console | None = None
) -> None:
    """Print verdict, notes and tables, with at most `queries` improved and degraded queries, on a rich console.

    Raises:
        MissingExtraError: rich is not installed.
    """
    out = console or require("rich.console").Console()
    for line in (str(comparison), *(f"- {note}" for note in comparison.notes)):
        out.print(line, markup=False, highlight=False)
    for table in comparison_tables(comparison, queries=queries, width=_TERMINAL_CELL_WIDTH):
        out.print()
        out.print(table.to_rich())


def shortened(text: Any, width: int = _CELL_WIDTH) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def _difference_cells(found: Difference) -> tuple[str, ...]:
    low, high = found.interval
    return (
        f"{found.base:.3f}",
        f"{found.tuned:.3f}",
        f"{found.difference:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        str(found.improved),
        str(found.degraded),
        f"{found.p_value:.3f}" if found.p_value >= 0.001 else "< 0.001",
    )


def _query_cells(outcome: QueryOutcome, comparison: RetrievalComparison, width: int) -> tuple[str, ...]:
    def first(ranking: tuple[str, ...]) -> str:
        if not ranking:
            return "nothing"
        mark = "relevant: " if ranking[0] in outcome.relevant else "not relevant: "
        return mark + shortened(comparison.dataset.corpus.get(ranking[0], ranking[0]), width)

    ndcg = f"{outcome.base:.3f}", f"{outcome.tuned:.3f}"
    return (shortened(outcome.text, width), *ndcg, first(outcome.base_top), first(outcome.tuned_top))


def _escape(text: str) -> str:
    """Markdown that shows a text literally, even if it contains markup."""
    return re.sub(r"([\\|`*_\[\]~])", r"\\\1", html.escape(text, quote=False))
