"""A picture of the ratios: one line a case, its interval, and its bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the rows of a run."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    colors = {"eval": "tab:blue", "train": "tab:orange", "grad": "tab:green"}
    figure, axes = plt.subplots(figsize=(9, 0.22 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        axes.plot([row["low"], row["high"]], [place, place], color=colors[row["mode"]], linewidth=3)
        axes.plot(row["ratio"], place, "o", color=colors[row["mode"]], markersize=4)
        if row["bar"] is not None:
            axes.plot(row["bar"], place, "|", color="black", markersize=9)
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", linewidth=0.3)
    for mode, color in colors.items():
        axes.plot([], [], color=color, linewidth=3, label=mode)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(colors), frameon=False)
    axes.set_ylim(-1, len(rows))
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)], fontsize=6)
    axes.set_xlabel("ours / peer (|: the bar; left of 1 is faster)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
