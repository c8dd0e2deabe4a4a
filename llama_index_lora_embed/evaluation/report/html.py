"""Write `report.html`: one page with the verdict on a model and the evidence for it."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError
from llama_index_lora_embed.core.files import whole_file
from llama_index_lora_embed.evaluation.metrics import metric_label
from llama_index_lora_embed.evaluation.pair_comparison import compare_pairs
from llama_index_lora_embed.evaluation.pairs import PairEvaluation
from llama_index_lora_embed.evaluation.report import plots
from llama_index_lora_embed.evaluation.report.run_facts import RunFacts
from llama_index_lora_embed.evaluation.report.tables import Table, comparison_tables, metrics_table, shortened
from llama_index_lora_embed.evaluation.retrieval_comparison import QueryOutcome, RetrievalComparison
from llama_index_lora_embed.evaluation.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUERIES = 10  # improved and degraded queries that are shown
_PASSAGES = 3  # passages of each
_PASSAGE_WIDTH = 220  # characters of a passage
_STYLES = {Verdict.BETTER: "better", Verdict.WORSE: "worse"}
_CURVES = "Training loss and validation metrics; the dashed line marks the step whose weights were written."
_METRICS = "Means over the queries, with 95 % intervals."
_SIMILARITIES = (
    "Relevant passages should lie to the right of the best other passages; where the two overlap, the search errs."
)
_SLICES = "Grey slices show no clear difference or are too small. Of twenty slices, one is coloured by chance."
_MAP = (
    "A sample of queries and their relevant passages (t-SNE). Short lines are good; the positions and sizes of groups "
    "mean nothing."
)
_PAIRS = "The further apart the two distributions are, the better a threshold separates them."


class _Plot(NamedTuple):
    name: str  # of its file, without extension
    caption: str
    figure: Figure


def write_report(
    path: str | os.PathLike[str],
    comparison: RetrievalComparison | tuple[PairEvaluation, PairEvaluation],
    *,
    run: RunFacts | str | os.PathLike[str] | None = None,
    figures: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write one self-contained page: verdict, plots, metrics, improved and degraded queries, settings of the run.

    The page loads nothing, so it can be opened from a disk and sent around.

    Args:
        path: File to write; its folder is created.
        comparison: Result of `compare_retrieval`; or the evaluations of base and tuned on labelled pairs.
        run: Adapter directory of the run, for its curves and settings; None leaves these out.
        figures: Folder in which the plots are saved as PNG files too; None saves none.
        title: Title; None for the name of the adapter directory.

    Raises:
        AdapterError: `run` is not an adapter directory of this package.
        ConfigError: comparison is of another type.
        MissingExtraError: The extra "report" is not installed.
        OutputDirectoryError: The page or a plot cannot be written; an existing page is unchanged.
    """
    import jinja2

    facts = run if isinstance(run, RunFacts) or run is None else RunFacts.read(run)
    content: dict[str, Any]
    if isinstance(comparison, RetrievalComparison):
        result, line = comparison.comparison, str(comparison)
        shown = list(_retrieval_plots(comparison))
        content = {
            "notes": comparison.notes,
            "names": comparison.names,
            "tables": comparison_tables(comparison, queries=0),
            "improved": [_side_by_side(outcome, comparison) for outcome in comparison.improved[:_QUERIES]],
            "degraded": [_side_by_side(outcome, comparison) for outcome in comparison.degraded[:_QUERIES]],
        }
    elif isinstance(comparison, tuple) and [type(item) for item in comparison] == [PairEvaluation, PairEvaluation]:
        result = compare_pairs(*comparison)
        line, by_name = str(result), {"base": comparison[0], "tuned": comparison[1]}
        shown = [_Plot("similarities", _PAIRS, plots.pair_distributions(by_name))]
        content = {"notes": [], "names": [], "tables": [metrics_table(by_name)], "improved": [], "degraded": []}
    else:
        raise ConfigError(
            f"a comparison of type {type(comparison).__name__}",
            "the result of compare_retrieval, or (base, tuned) of evaluate_pairs",
            "write_report(path, compare_retrieval(base, tuned, val))",
        )
    if facts is not None and facts.manifest.base_change:
        content["notes"] = [facts.manifest.base_change, *content["notes"]]
        content["tables"].insert(0, _run_metrics(facts))
    if facts is not None and facts.log:
        shown.insert(0, _Plot("curves", _CURVES, plots.curves(facts.log, facts.manifest.best_step)))
    files = {plot.name: plots.png(plot.figure) for plot in shown}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llama_index_lora_embed.evaluation.report", "."), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        title=title or (facts.path.name if facts else "Base against tuned"),
        verdict=result.verdict.value,
        style=_STYLES.get(result.verdict, "unclear"),
        line=line.removeprefix(f"{result.verdict.value} "),
        plots=[(plot.name, plot.caption, base64.b64encode(files[plot.name]).decode()) for plot in shown],
        facts=[] if facts is None else _run_tables(facts),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **content,
    )
    target = Path(path).expanduser().absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if figures is not None:
            folder = Path(figures).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            for name, png in files.items():
                with whole_file(folder / f"{name}.png", "wb") as file:
                    file.write(png)
        with whole_file(target, "wb") as file:
            file.write(page.encode("utf-8", "replace"))  # lone surrogates
    except OSError as error:
        raise OutputDirectoryError(
            f"a report that cannot be written ({error})", "a writable folder", "Choose another path."
        ) from error
    return target


def _retrieval_plots(comparison: RetrievalComparison) -> Iterator[_Plot]:
    evaluations = dict(zip(comparison.names, (comparison.base, comparison.tuned), strict=True))
    yield _Plot("metrics", _METRICS, plots.bars(evaluations))
    if any(evaluation.similarities for evaluation in evaluations.values()):
        yield _Plot("similarities", _SIMILARITIES, plots.distributions(evaluations))
    if comparison.slices:
        yield _Plot("slices", _SLICES, plots.slices(comparison))
    samples = {name: e.sample for name, e in evaluations.items() if e.sample is not None}
    if len(samples) == 2 and all(len(s.queries) + len(s.passages) >= 4 for s in samples.values()):
        yield _Plot("map", _MAP, plots.embedding_map(samples))


def _side_by_side(outcome: QueryOutcome, comparison: RetrievalComparison) -> dict[str, Any]:
    corpus = comparison.dataset.corpus

    def top(ids: tuple[str, ...]) -> list[tuple[bool, str]]:
        return [(i in outcome.relevant, shortened(corpus.get(i, i), _PASSAGE_WIDTH)) for i in ids[:_PASSAGES]]

    return {
        "text": outcome.text,
        "ndcg": (f"{outcome.base:.2f}", f"{outcome.tuned:.2f}"),
        "top": (top(outcome.base_top), top(outcome.tuned_top)),
        "relevant": [shortened(corpus.get(i, i), _PASSAGE_WIDTH) for i in outcome.relevant],
    }


def _run_metrics(facts: RunFacts) -> Table:
    """All rows of the run's own evaluation, between base and tuned the base with the run's length or windows."""
    rows = facts.manifest.metrics
    names = list(rows["base"])
    cells = [(row, *(f"{values[name]:.3f}" for name in names)) for row, values in rows.items()]
    return Table("Metrics of the run", ("", *map(metric_label, names)), cells)


def _run_tables(facts: RunFacts) -> list[Table]:
    manifest = facts.manifest
    run = {
        "adapter": facts.path.name,  # not its path, because the page is sent around
        "created": manifest.created,
        "base": f"{manifest.base.get('model_id', '')} {manifest.base.get('revision') or ''}".strip(),
        "fingerprint": manifest.fingerprint,
        "step written": manifest.best_step,
        "verdict of the run": manifest.verdict,
        "prompts": ", ".join(f"{name}: {prompt!r}" for name, prompt in manifest.prompts.items()),
        "max_seq_length": manifest.max_seq_length,
        "window": manifest.window,
    }
    sections = {
        "Run": run,
        "Data": manifest.dataset,
        "Truncated texts": manifest.truncation,
        "LoRA": manifest.lora,
        "Settings": manifest.settings,
        "Libraries": manifest.versions,
    }
    tables = []
    for title, values in sections.items():
        rows = [(name.replace("_", " "), _as_text(value)) for name, value in (values or {}).items()]
        if rows:
            tables.append(Table(title, ("", " "), rows, text_columns=(" ",)))
    if facts.data:
        tables.insert(2, Table("From nodes to queries", ("",), [(line,) for line in facts.data]))
    return tables


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_as_text(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_as_text, value))
    return "" if value is None else str(value)
