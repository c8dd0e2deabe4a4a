"""`report.html`: one page that says whether a model is better, and by what it was judged."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index_lora_embed.core.errors import ConfigError, OutputDirectoryError
from llama_index_lora_embed.core.files import whole_file
from llama_index_lora_embed.evaluation.compare import Comparison, compare_pairs
from llama_index_lora_embed.evaluation.pairs import PairEvaluation
from llama_index_lora_embed.evaluation.report import plots
from llama_index_lora_embed.evaluation.report.run_facts import RunFacts
from llama_index_lora_embed.evaluation.report.tables import Table, comparison_tables, metrics_table, shortened
from llama_index_lora_embed.evaluation.retrieval_comparison import QueryOutcome, RetrievalComparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUERIES = 10  # won and lost ones that are shown in full
_FOUND = 3  # passages of each
_WIDTH = 220  # characters of a passage
_FEWEST = 4  # vectors that a map takes


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: Of its file, without ending.
        caption: What it shows, and how to read it.
        png: The file.
    """

    name: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """The picture itself as an address, so that the page needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def write_report(
    path: str | os.PathLike[str],
    comparison: RetrievalComparison | tuple[PairEvaluation, PairEvaluation],
    *,
    run: RunFacts | str | os.PathLike[str] | None = None,
    figures: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write one self-contained page: verdict, curves, measures, pictures, queries won and lost, settings.

    It loads nothing from anywhere, so that it opens from a disk and can be sent around.

    Args:
        path: File to write; its folder is made.
        comparison: What `compare_retrieval` gave; or base and tuned on labelled pairs.
        run: The run's adapter directory, for its curves and settings; None leaves these out.
        figures: Folder for the pictures as PNG files of their own, for notebooks; None writes none.
        title: Heading; None takes the adapter directory's name.

    Returns:
        The file.

    Raises:
        AdapterError: `run` is no adapter directory of this package.
        ConfigError: comparison is neither.
        MissingExtraError: The extra "report" is not installed.
        OutputDirectoryError: The page or a picture cannot be written; an older page is unchanged.
    """
    import jinja2

    facts = run if isinstance(run, RunFacts) or run is None else RunFacts.read(run)
    if isinstance(comparison, RetrievalComparison):
        verdict, line, notes = comparison.comparison, str(comparison), comparison.notes
        tables = comparison_tables(comparison, queries=0)
        pictures = list(_of_retrieval(comparison))
        won, lost = (
            [_side_by_side(outcome, comparison) for outcome in outcomes[:_QUERIES]]
            for outcomes in (comparison.won, comparison.lost)
        )
        names = comparison.names
    elif (
        isinstance(comparison, tuple)
        and len(comparison) == 2
        and all(isinstance(c, PairEvaluation) for c in comparison)
    ):
        base, tuned = comparison
        verdict, notes, won, lost, names = compare_pairs(base, tuned), [], [], [], ("base", "tuned")
        line, tables = str(verdict), [metrics_table({"base": base, "tuned": tuned})]
        pictures = [_picture("similarities", plots.pair_distributions({"base": base, "tuned": tuned}), _PAIRS)]
    else:
        raise ConfigError(
            f"a comparison of type {type(comparison).__name__}",
            "what compare_retrieval gives, or (base, tuned) of evaluate_pairs",
            "write_report(path, compare_retrieval(base, tuned, val))",
        )
    if facts is not None and facts.log:
        pictures.insert(0, _picture("curves", plots.curves(facts.log, facts.manifest.best_step), _CURVES))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llama_index_lora_embed.evaluation.report", "."), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        title=title or (facts.path.name if facts else "Base against tuned"),
        verdict=verdict.verdict.value,
        colour=_colour(verdict),
        line=line.partition(": ")[2],
        notes=notes,
        names=names,
        pictures=pictures,
        tables=tables,
        won=won,
        lost=lost,
        facts=[] if facts is None else _facts(facts),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    target = Path(path).expanduser().absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if figures is not None:
            folder = Path(figures).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            for picture in pictures:
                with whole_file(folder / f"{picture.name}.png", "wb") as file:
                    file.write(picture.png)
        with whole_file(target, "wb") as file:
            file.write(page.encode("utf-8", "replace"))  # halves of characters
    except OSError as error:
        raise OutputDirectoryError(
            f"a report that cannot be written ({error})", "a folder that can be written", "Name another path."
        ) from error
    return target


_SLICES = (
    "Grey slices may have gained or lost, or are too small to tell. Of twenty slices one lies beside zero by chance."
)
_CURVES = (
    "Loss of the training batches, and measures on the validation set; the dashed line is the step that was written."
)
_PAIRS = "The further the two are apart, the better a threshold can tell them apart."


def _of_retrieval(comparison: RetrievalComparison) -> Iterator[Picture]:
    both = dict(zip(comparison.names, (comparison.base, comparison.tuned), strict=True))
    yield _picture(
        "measures", plots.bars(both), "Means over the queries, with the interval that other queries would give."
    )
    if any(e.similarities for e in both.values()):
        caption = "The relevant passages are to lie to the right of the best others; where they overlap, search errs."
        yield _picture("similarities", plots.distributions(both), caption)
    if comparison.slices:
        yield _picture("slices", plots.slices(comparison), _SLICES)
    samples = {name: e.sample for name, e in both.items() if e.sample is not None}
    if len(samples) == len(both) and all(len(s.queries) + len(s.passages) >= _FEWEST for s in samples.values()):
        caption = (
            "Some queries and their passages, drawn so that near ones are near (t-SNE). Short lines are good; "
            "positions and sizes of groups say nothing."
        )
        yield _picture("map", plots.vector_map(samples), caption)


def _picture(name: str, figure: Figure, caption: str) -> Picture:
    return Picture(name, caption, plots.png(figure))


def _side_by_side(outcome: QueryOutcome, comparison: RetrievalComparison) -> dict[str, Any]:
    corpus = comparison.dataset.corpus

    def shown(ids: tuple[str, ...]) -> list[tuple[bool, str]]:
        return [(i in outcome.relevant, shortened(corpus.get(i, i), _WIDTH)) for i in ids]

    return {
        "text": outcome.text,
        "scores": (f"{outcome.base:.2f}", f"{outcome.tuned:.2f}"),
        "found": (shown(outcome.base_found[:_FOUND]), shown(outcome.tuned_found[:_FOUND])),
        "wanted": [shortened(corpus.get(i, i), _WIDTH) for i in outcome.relevant],
    }


def _facts(facts: RunFacts) -> list[Table]:
    manifest = facts.manifest
    truncation = manifest.truncation
    run = {
        "adapter": facts.path.name,  # the page is sent around
        "created": manifest.created,
        "base": f"{manifest.base.get('model_id', '')} {manifest.base.get('revision') or ''}".strip(),
        "fingerprint": manifest.fingerprint,
        "step written": manifest.best_step,
        "verdict when it was trained": manifest.verdict,
        "prompts": ", ".join(f"{name}: {prompt!r}" for name, prompt in manifest.prompts.items()),
        "max_seq_length": manifest.max_seq_length,
    }
    tables = [_pairs("Run", run), _pairs("Data", manifest.dataset)]
    if facts.data:
        tables.append(Table("From nodes to questions", ("",), [(line,) for line in facts.data]))
    if truncation:
        tables.append(_pairs("Texts cut at the end", truncation))
    return [
        *tables,
        _pairs("LoRA", manifest.lora),
        _pairs("Settings", manifest.settings),
        _pairs("Libraries", manifest.versions),
    ]


def _pairs(title: str, values: dict[str, Any]) -> Table:
    return Table(title, ("", " "), [(str(k).replace("_", " "), _plain(v)) for k, v in values.items()], texts=(" ",))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return "" if value is None else str(value)


def _colour(comparison: Comparison) -> str:
    return {"BETTER": "better", "WORSE": "worse"}.get(comparison.verdict.value, "unclear")
