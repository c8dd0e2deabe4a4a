"""Plots of a comparison and of a run, with matplotlib; each function returns a new figure."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.evaluation.metrics import HEADLINE, metric_label
from llama_index_lora_embed.evaluation.significance import MIN_QUERIES, paired_intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_index_lora_embed.evaluation.pairs import PairEvaluation
    from llama_index_lora_embed.evaluation.retrieval import EmbeddingSample, RetrievalEvaluation
    from llama_index_lora_embed.evaluation.retrieval_comparison import RetrievalComparison

_GREY, _BLUE, _RED, _ORANGE, _LIGHT, _DARK = "#8d949e", "#0b7285", "#c92a2a", "#e8590c", "#e9ecef", "#343a40"
_DPI = 160
_BINS = 40
_PERPLEXITY = 15.0  # of t-SNE; less if there are few points


def curves(log: Sequence[Mapping[str, Any]], best_step: int | None = None) -> Figure:
    """Loss and metrics over the steps in `log.jsonl`; the step whose weights were written is marked."""
    figure, (left, right) = _panels(2)
    losses = [(line["step"], line["loss"]) for line in log if isinstance(line.get("loss"), (int, float))]
    left.plot(*zip(*losses, strict=True), color=_BLUE, marker="o", markersize=3) if losses else _nothing(left)
    _label(left, "training loss", "step")
    for name, style in zip((*HEADLINE, "roc_auc", "spearman"), ("-", "-", ":", "-", ":", "-", "-"), strict=True):
        points = [(x["step"], x[f"eval_{name}"]) for x in log if isinstance(x.get(f"eval_{name}"), (int, float))]
        if points:
            right.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=metric_label(name))
    if right.lines:
        if best_step is not None:
            right.axvline(best_step, color=_GREY, linewidth=1, linestyle="--", label="weights written")
        right.legend(frameon=False, fontsize=8)
    else:
        _nothing(right)
    _label(right, "validation", "step")
    return figure


def bars(evaluations: Mapping[str, RetrievalEvaluation]) -> Figure:
    """Means of two models in the headline metrics, with 95 % intervals (`significance.paired_intervals`)."""
    names = [n for n in HEADLINE if all(n in e.metrics for e in evaluations.values())]
    figure, (axes,) = _panels(1)
    for (label, evaluation), shift, colour in zip(evaluations.items(), (-0.2, 0.2), (_GREY, _BLUE), strict=True):
        values = np.array([[per_query[n] for n in names] for per_query in evaluation.per_query.values()])
        means, (low, high) = values.mean(axis=0), np.transpose(paired_intervals(values))
        around = np.clip([means - low, high - means], 0, None)
        places = np.arange(len(names)) + shift
        axes.bar(places, means, 0.376, color=colour, label=_plain(label))
        axes.errorbar(places, means, yerr=around, fmt="none", ecolor=_DARK, capsize=2, linewidth=1)
    axes.set_xticks(np.arange(len(names)), [metric_label(n) for n in names])
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    _label(axes, "metrics with 95 % intervals", "")
    return figure


def distributions(evaluations: Mapping[str, RetrievalEvaluation]) -> Figure:
    """Similarities of queries to relevant passages and to the best other passage; a panel for each model."""
    figure, panels = _panels(len(evaluations))
    for axes, (label, evaluation) in zip(panels, evaluations.items(), strict=True):
        right: list[float] = []
        wrong: list[float] = []
        for query_id, relevant in evaluation.relevant_similarities.items():
            scores = zip(evaluation.rankings[query_id], evaluation.similarities[query_id], strict=True)
            right += relevant.values()
            wrong += [score for passage_id, score in scores if passage_id not in relevant][:1]
        _two_histograms(axes, {"relevant passages": right, "the best other passage": wrong})
        _label(axes, label, "cosine similarity to the query")
    return figure


def pair_distributions(evaluations: Mapping[str, PairEvaluation]) -> Figure:
    """Similarities of labelled pairs by label: 1 and 0, or upper and lower half of the grades."""
    figure, panels = _panels(len(evaluations))
    for axes, (label, evaluation) in zip(panels, evaluations.items(), strict=True):
        positive = evaluation.labels > (0.5 if evaluation.binary else float(np.median(evaluation.labels)))
        names = ("labelled 1", "labelled 0") if evaluation.binary else ("upper half of the labels", "lower half")
        parts = evaluation.similarities[positive], evaluation.similarities[~positive]
        _two_histograms(axes, dict(zip(names, parts, strict=True)))
        _label(axes, label, "cosine similarity")
    return figure


def slices(comparison: RetrievalComparison) -> Figure:
    """Difference in nDCG@10 with its interval on all queries and on each slice.

    Grey if the interval includes 0, or if fewer than ten queries changed.
    """
    whole = comparison.metrics["ndcg@10"]
    rows = [("all queries", comparison.comparison.queries, whole)]
    rows += [(f"{s.by}: {s.name}", s.queries, s.ndcg) for s in comparison.slices]
    figure, (axes,) = _panels(1, height=0.8 + 0.3 * len(rows))
    axes.grid(visible=False, axis="y")
    for place, (_, _, found) in enumerate(rows):
        low, high = found.interval
        few = found.improved + found.degraded < MIN_QUERIES
        colour = _GREY if few or low <= 0 <= high else _BLUE if low > 0 else _RED
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(found.difference, place, "o", color=colour, markersize=5)
    axes.axvline(0, color=_DARK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_plain(f"{name[:40]} ({count})") for name, count, _ in rows], fontsize=8)
    axes.invert_yaxis()
    _label(axes, "nDCG@10 by slice, difference with 95 % interval", "")
    return figure


def embedding_map(samples: Mapping[str, EmbeddingSample]) -> Figure:
    """Queries and their relevant passages in two dimensions, a panel for each model; of at least four vectors.

    t-SNE by cosine distance (van der Maaten and Hinton 2008, scikit-learn): near points are similar, distances between
    groups mean nothing. A line connects each query to its passages: the shorter, the better.
    """
    from sklearn.manifold import TSNE

    figure, panels = _panels(len(samples), height=4.2)
    for axes, (label, sample) in zip(panels, samples.items(), strict=True):
        vectors = np.concatenate([sample.queries, sample.passages])
        perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
        # PCA needs at least as many vectors as dimensions of the plot
        start = "pca" if min(vectors.shape) >= 2 else "random"
        flat = TSNE(2, perplexity=perplexity, metric="cosine", init=start, random_state=0).fit_transform(vectors)
        queries, passages = np.split(flat, [len(sample.queries)])
        for query, passage in sample.links:
            axes.plot(*zip(queries[query], passages[passage], strict=True), color="#adb5bd", linewidth=0.6, zorder=1)
        axes.scatter(passages[:, 0], passages[:, 1], s=12, marker="s", color=_BLUE, label="passages", zorder=2)
        axes.scatter(queries[:, 0], queries[:, 1], s=10, color=_ORANGE, label="queries", zorder=3)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(frameon=False, fontsize=8)
        _label(axes, label, "")
    return figure


def trend(points: Sequence[tuple[str, float, tuple[float, float]]], metric: str) -> Figure:
    """A metric over versions of a model; each point is (version, mean, 95 % interval)."""
    figure, (axes,) = _panels(1)
    names, means, intervals = zip(*points, strict=True)
    low, high = np.transpose(intervals)
    around = np.clip([means - low, high - means], 0, None)
    axes.errorbar(range(len(points)), means, around, color=_BLUE, marker="o", ecolor=_GREY, capsize=3)
    axes.set_xticks(range(len(points)), [_plain(name) for name in names], rotation=30, ha="right", fontsize=8)
    _label(axes, f"{metric_label(metric)} by version", "")
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font lacks some scripts
        figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _panels(count: int, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    # pyplot would change the current figure of a notebook
    figure: Figure = require("matplotlib.figure").Figure(figsize=(8, height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0].tolist()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(color=_LIGHT)
    return figure, panels


def _two_histograms(axes: Axes, parts: Mapping[str, Any]) -> None:
    both = np.concatenate([*parts.values()])
    if not len(both):
        return _nothing(axes)
    edges: Any = np.histogram_bin_edges(both, _BINS)
    for (name, values), colour in zip(parts.items(), (_BLUE, _RED), strict=True):
        axes.hist(values, edges, color=colour, alpha=0.6, label=name)
    axes.legend(frameon=False, fontsize=8)
    return None


def _plain(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("\\", "/").replace("$", "\\$")


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not recorded", ha="center", va="center", color=_GREY, transform=axes.transAxes)


def _label(axes: Axes, title: str, x: str) -> None:
    axes.set_title(_plain(title), loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.tick_params(labelsize=8)
