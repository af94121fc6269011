"""How the cost of analysis and rewriting grows with the graph: a picture over a sweep, and the exponent in words."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

Records = Sequence[dict[str, Any]]
CAPTURE, REWRITE = "two captures (torch.export)", "analysis, planning and rewriting of both"


def points(records: Records) -> dict[str, list[tuple[int, float]]]:
    """(nodes of both graphs, seconds of processor time) of every model that was captured."""
    sound = [r for r in records if not r.get("error") and r["nodes"]]
    return {
        CAPTURE: [(r["nodes"], r["capture_seconds"]) for r in sound],
        REWRITE: [(r["nodes"], r["analysis_seconds"] + r["rewrite_seconds"]) for r in sound],
    }


def exponent(pairs: Sequence[tuple[int, float]]) -> float:
    """The slope of log seconds over log nodes: 1 is linear growth."""
    return linear_regression([log(n) for n, _ in pairs], [log(s) for _, s in pairs]).slope


def in_words(records: Records) -> str:
    """A line on cost for the page."""
    found = points(records)[REWRITE]
    if len(found) < 3:
        return ""
    each = median(seconds / nodes for nodes, seconds in found)
    return (
        f"Analysis, planning and rewriting take {1e3 * each:.2f} ms a node at the median, and grow as the number of "
        f"nodes to the power of {exponent(found):.2f}."
    )


def draw(records: Records, path: Path) -> None:
    """Seconds over nodes, both on logarithmic scales, with lines of slope one."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "gpd_fx"  # the same picture from the same numbers
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (label, pairs), colour in zip(points(records).items(), ("tab:gray", "tab:blue"), strict=True):
        nodes, seconds = [n for n, _ in pairs], [s for _, s in pairs]
        axes.scatter(nodes, seconds, s=12, alpha=0.6, color=colour, label=f"{label}, slope {exponent(pairs):.2f}")
        each = median(s / n for n, s in pairs)
        ends = [min(nodes), max(nodes)]
        axes.plot(ends, [each * n for n in ends], color=colour, linewidth=1, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="nodes of both graphs", ylabel="seconds of processor time")
    axes.set_title("Cost over the size of the graph; dashed lines are linear growth")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
