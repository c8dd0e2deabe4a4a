"""From events to figures: a row per contender with medians and ranges over the seeds, and ratios."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

Run = dict[str, Any]


def name_of(run: Run) -> str:
    """Letter of the contender, with the setting if it is not the default."""
    return str(run["contender"]) + ("" if run["setting"] == "default" else f":{run['setting']}")


def curve(run: Run) -> list[dict[str, Any]]:
    """Evaluations on the test set, in order."""
    return [event for event in run["events"] if event["event"] == "evaluated"]


def at(run: Run, name: str) -> dict[str, Any] | None:
    """The first event of a name."""
    return next((event for event in run["events"] if event["event"] == name), None)


def target_of(runs: list[Run]) -> float | None:
    """The median of (a)'s nDCG@10 after its last step."""
    finals = [curve(run)[-1]["ndcg@10"] for run in runs if run["contender"] == "a" and at(run, "done")]
    return median(finals) if finals else None


def figures(run: Run, target: float | None) -> dict[str, float | None]:
    """The figures of one run; None for those that a stopped run did not reach.

    "to target" is the time on the clock, including preparation, of the first evaluation that is not below the target.
    "training" is the time from the first step to the last; "wall" is all of it with the contender's own evaluations.
    Tokens per second and peak memory of a stopped run are those up to its last evaluation.
    """
    points, begin, end, done = curve(run), at(run, "train_begin"), at(run, "train_end"), at(run, "done")
    training = end["seconds"] - begin["seconds"] if begin and end else None
    reached = next((p["seconds"] for p in points if target is not None and p["ndcg@10"] >= target), None)
    kept = at(run, "kept")
    own = (done or {}).get("own_evaluation_seconds")  # not in results of earlier versions
    last = end if done else points[-1] if points else None
    epochs = done["epochs"] if done else points[-1]["epoch"] if points else 0
    tokens = (done or begin or {}).get("tokens_per_epoch")
    rate = None
    if tokens and begin and last and last["seconds"] > begin["seconds"]:
        rate = tokens * epochs / (last["seconds"] - begin["seconds"])
    return {
        "preparation s": begin["seconds"] if begin else None,
        "training s": training,
        "all s": done["seconds"] if done else None,
        "wall s": done["seconds"] + own if done and own is not None else None,
        "tokens/s": rate,
        "peak MB": done["peak_mb"] if done else points[-1].get("peak_mb") if points else None,
        "nDCG@10": points[-1]["ndcg@10"] if points and done else None,
        "hit@5": points[-1]["hit@5"] if points and done else None,
        "kept nDCG@10": kept["ndcg@10"] if kept else None,
        "kept hit@5": kept["hit@5"] if kept else None,
        "to target s": reached,
    }


def summarise(runs: list[Run], target: float | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Values of all seeds, their median and range, by contender and figure."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(name_of(run) for run in runs):
        rows = [figures(run, target) for run in runs if name_of(run) == name]
        cells: dict[str, dict[str, Any]] = {}
        for figure in rows[0]:
            values = [row[figure] for row in rows]
            known = [value for value in values if value is not None]
            if known and figure == "to target s":
                # a seed that never reached the target is the worst
                ordered = sorted(known) + [None] * (len(values) - len(known))
                middle = median(known) if len(known) == len(values) else ordered[len(ordered) // 2]
                cells[figure] = {"median": middle, "min": min(known), "max": ordered[-1], "values": values}
            elif known:  # of the runs that reached it
                cells[figure] = {"median": median(known), "min": min(known), "max": max(known), "values": values}
        summary[name] = cells
    return summary


def loss_curves(runs: list[Run]) -> list[str]:
    """Mean loss over each fifth of a like-for-like run: a faster contender must not learn less."""
    lines = []
    for run in runs:
        losses = [event["loss"] for event in run["events"] if event["event"] == "loss"]
        if run["contender"] in ("b2", "d2") and len(losses) >= 5:
            parts = [losses[len(losses) * i // 5 : len(losses) * (i + 1) // 5] for i in range(5)]
            means = ", ".join(f"{sum(part) / len(part):.3f}" for part in parts)
            lines.append(f"{name_of(run)} seed {run['seed']}: loss by fifths of the run {means}")
    return lines


def ratios(summary: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """One sentence per comparison of two medians, if both exist."""

    def of(name: str, figure: str) -> float | None:
        value: float | None = summary.get(name, {}).get(figure, {}).get("median")
        return value

    lines = []

    def add(text: str, ours: float | None, theirs: float | None, shape: Callable[[float], str]) -> None:
        if ours and theirs:
            lines.append(f"{text}: {shape(ours / theirs)}")

    def part(value: float) -> str:
        return f"1/{1 / value:.1f}" if value < 1 else f"{value:.2f} times"

    for name in [key for key in summary if key.partition(":")[0] == "d"]:
        needed = of(name, "to target s")
        for other in ("a", "b"):
            add(f"{name}: time to (a)'s nDCG@10, of ({other})'s whole training", needed, of(other, "all s"), part)
        for other in ("a", "b", "c"):
            add(f"{name}: time to (a)'s nDCG@10, of ({other})'s", needed, of(other, "to target s"), part)
            add(f"{name}: peak memory, of ({other})'s", of(name, "peak MB"), of(other, "peak MB"), "{:.0%}".format)
            add(
                f"{name}: training tokens per second, of ({other})'s", of(name, "tokens/s"), of(other, "tokens/s"), part
            )
            if needed and other in summary and not of(other, "to target s"):
                lines.append(f"{name}: ({other}) does not reach (a)'s nDCG@10 in half of its runs or more")
    for name in [key for key in summary if key.partition(":")[0] == "d2"]:
        same = name.replace("d2", "b2")
        other = same if same in summary else "b2"
        add(f"{name}: training tokens per second, of ({other})'s, like for like", of(name, "tokens/s"),
            of(other, "tokens/s"), "{:.2f} times".format)  # fmt: skip
    return lines


def table(summary: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: median (lowest to highest)."""
    times = ["training s", "all s", "wall s"]
    columns = [*times, "tokens/s", "peak MB", "nDCG@10", "hit@5", "kept nDCG@10", "to target s"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in summary.items():
        shown = [_cell(cells.get(column), 3 if "@" in column else 0 if "MB" in column else 1) for column in columns]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell(cell: dict[str, Any] | None, digits: int) -> str:
    if cell is None:
        return "-"

    def number(value: float | None) -> str:
        return "never" if value is None else f"{value:,.{digits}f}"

    if len(cell["values"]) == 1:
        return number(cell["median"])
    known = sum(value is not None for value in cell["values"])
    some = "" if known == len(cell["values"]) or cell["max"] is None else f"; {known} of {len(cell['values'])} runs"
    return f"{number(cell['median'])} ({number(cell['min'])} to {number(cell['max'])}{some})"
