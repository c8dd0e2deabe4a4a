"""The README's table and picture of base against tuned, from the figures in figures.json.

    python benchmarks/readme_picture.py            # draws docs/images/base_against_tuned.svg
    python benchmarks/readme_picture.py --table    # prints the README's table

It measures nothing: each figure stands in figures.json beside the command that measured it.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES = HERE / "figures.json"
PICTURE = HERE.parent / "docs" / "images" / "base_against_tuned.svg"
METRICS = {"ndcg@10": "nDCG@10", "hit@5": "hit@5"}
COLOURS = {"base": "#9aa5b1", "tuned": "#3f51b5", "tuned, `quality` settings": "#00897b"}


def figures() -> list[dict[str, Any]]:
    """The data sets, each with a row for each model."""
    sets: list[dict[str, Any]] = json.loads(FIGURES.read_text(encoding="utf-8"))["sets"]
    return sets


def table() -> str:
    """The README's table in Markdown."""
    lines = [
        "| trained on | evaluated on | model | hit@1 | hit@5 | nDCG@10 | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for data in figures():
        for number, row in enumerate(data["rows"]):
            sets = [data["trained_on"], data["evaluated_on"]] if number == 0 else ["", ""]
            values = [f"{row[metric]:.3f}" for metric in ("hit@1", "hit@5", "ndcg@10")]
            cells = [*sets, row["model"], *values, row["training"] or ""]
            lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Write the picture: a panel for each metric, a group of bars for each data set, without untrained changes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # text stays text, and the file depends on the figures alone
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "readme", "font.family": "sans-serif"})
    sets = figures()
    fig, panels = plt.subplots(1, len(METRICS), figsize=(11, 4.2), sharey=True, layout="constrained")
    names = [f"{data['trained_on'].split(':')[0]}\n→ {data['evaluated_on']}" for data in sets]
    for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for place, data in enumerate(sets):
            rows = [row for row in data["rows"] if row["model"] in COLOURS]
            for number, row in enumerate(rows):
                at = place + (number - (len(rows) - 1) / 2) * 0.27
                panel.barh(at, row[metric], 0.25, color=COLOURS[row["model"]])
                panel.text(row[metric] + 0.01, at, f"{row[metric]:.3f}", va="center", fontsize=9)
        panel.set_title(title)
        panel.set_xlim(0, 1.08)
        panel.set_yticks(range(len(sets)), ["\n".join(textwrap.wrap(n, 30)) for n in names], fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    labels = [name.replace("`", "") for name in COLOURS]
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, facecolor="white", metadata={"Date": None, "Creator": None})


def main() -> None:
    """Draw, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the README's table instead")
    parser.add_argument("--out", type=Path, default=PICTURE, help="file to write")
    args = parser.parse_args()
    if args.table:
        print(table(), end="")
    else:
        draw(args.out)


if __name__ == "__main__":
    main()
