"""Quality over time: `python -m speed.plot results.json speed.png`, in an environment with matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from speed.contenders import CONTENDERS
from speed.report import curve, name_of


def draw(results: dict[str, Any], path: Path) -> None:
    """nDCG@10 of every run over the seconds on the clock, with a colour per contender and a line per seed."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    runs = [run for run in results["runs"] if run["contender"] in "abcd" and curve(run)]
    names = list(dict.fromkeys(name_of(run) for run in runs))
    for number, name in enumerate(names):
        mine = [run for run in runs if name_of(run) == name]
        title = CONTENDERS[name.partition(":")[0]].title
        label = f"({name}) {title}"
        for run in mine:
            points = curve(run)
            axes.plot([p["seconds"] for p in points], [p["ndcg@10"] for p in points], marker="o", markersize=3,
                      color=f"C{number}", alpha=0.7, label=label)  # fmt: skip
            label = None  # once in the legend
    if results["target_ndcg@10"] is not None:
        axes.axhline(results["target_ndcg@10"], color="grey", linestyle="--", linewidth=1, label="(a)'s last step")
    machine = results["machine"]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("seconds, without evaluations")
    axes.set_ylabel(f"nDCG@10 on {results['arguments']['test']}")
    axes.set_title(f"{machine['processor']}, {machine['cores']} cores", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
