"""The runs in the terminal, and as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cifar.arms import ARMS
from bench.cifar.tables import COLUMNS, Records, finals, rows_of


def show(records: Records, folder: Path) -> None:
    """Print the table; draw the accuracies and the gap into the folder."""
    table = Table(title="accuracy on the test images in percent; gain: seed by seed")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("arm", "over") else "right")
    for row in rows_of(records):
        table.add_row(*row)
    Console().print(table)
    draw(records, list(ARMS), folder / "curves.svg")


def draw(records: Records, names: Sequence[str], path: Path) -> None:
    """Every run's last accuracy, the mean accuracies over epochs, and how far dynamic teachers are ahead."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "gpd_fx"  # the same picture from the same numbers
    from matplotlib import pyplot, ticker

    runs = {name: finals(records, name) for name in names}
    runs = {name: found for name, found in runs.items() if found}
    if not runs:
        return
    figure, (points, curves, gaps) = pyplot.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    for place, (name, found) in enumerate(runs.items()):
        colour, title = f"C{place % 10}", ARMS[name].title
        last = [r["folded"] for r in found]
        points.plot([place] * len(last), last, "o", color=colour, alpha=0.6)
        points.plot([place - 0.3, place + 0.3], [statistics.mean(last)] * 2, color=colour)
        epochs = range(1, 1 + min(len(r["student"]) for r in found))
        curves.plot(epochs, _means(found, "student"), color=colour, label=title)
        if found[0]["teacher"]:
            curves.plot(epochs, _means(found, "teacher"), "--", color=colour, linewidth=1)
            ahead = [t - s for t, s in zip(_means(found, "teacher"), _means(found, "student"), strict=True)]
            gaps.plot(epochs, ahead, color=colour, label=title)
    points.set_xticks(range(len(runs)), [ARMS[name].title for name in runs], rotation=30, ha="right", fontsize=8)
    points.set(title="the student at the end: each seed, and the mean", ylabel="accuracy, %")
    curves.set(title="students, and dashed their dynamic teachers", xlabel="epoch", ylabel="accuracy, %")
    gaps.set(title="dynamic teacher ahead of its student", xlabel="epoch", ylabel="points")
    gaps.axhline(0, color="grey", linewidth=0.5)
    curves.legend(fontsize=8)
    for axis in (points, curves, gaps):
        axis.grid(alpha=0.3)
    for axis in (curves, gaps):
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _means(found: Records, network: str) -> list[float]:
    columns: list[tuple[Any, ...]] = list(zip(*(r[network] for r in found), strict=False))
    return [statistics.mean(column) for column in columns]
