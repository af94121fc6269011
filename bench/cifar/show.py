"""The table and the picture of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cifar.arms import ARMS

COLUMNS = ("arm", "rate", "runs", "student", "over alone", "dynamic teacher", "cost")


def rows_of(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row an arm: accuracies of the last epoch, mean and standard deviation over seeds; the cost of a run."""
    finals = {name: [r for r in records if r["arm"] == name and not r["tuning"] and r["student"]] for name in ARMS}
    alone = {r["seed"]: r for r in finals["alone"]}
    cost = statistics.mean(r["seconds"] for r in alone.values()) if alone else None
    rows: list[list[str]] = []
    for name, found in finals.items():
        if not found:
            continue
        pairs = [r["folded"] - alone[r["seed"]]["folded"] for r in found if r["seed"] in alone and name != "alone"]
        seconds = statistics.mean(r["seconds"] for r in found)
        rows.append(
            [
                ARMS[name].title,
                f"{found[0]['rate']:g}",
                str(len(found)),
                _spread([r["folded"] for r in found]),
                _spread(pairs, "+") if pairs else "",
                _spread([r["teacher"][-1] for r in found]) if found[0]["teacher"] else "",
                f"{seconds:.0f} s" + (f", {seconds / cost:.2f}x" if cost else ""),
            ]
        )
    return rows


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = statistics.mean(values)
    text = f"{mean:{sign}.2f}"
    return f"{text} ± {statistics.stdev(values):.2f}" if len(values) > 1 else text


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The table for a page."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows_of(records))]) + "\n"


def show(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Print the table; write it, and the curves of accuracy and of the gap, into the folder."""
    table = Table(title="accuracy on the test images in percent; difference to the same seed alone")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows_of(records):
        table.add_row(*row)
    Console().print(table)
    (folder / "table.md").write_text(markdown(records), encoding="utf-8")
    draw(records, folder / "curves.svg")


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean accuracy over epochs, and how far the dynamic teacher is ahead of its student."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, arm in ARMS.items():
        found = [r for r in records if r["arm"] == name and not r["tuning"] and r["student"]]
        if not found:
            continue
        epochs = range(1, 1 + min(len(r["student"]) for r in found))
        left.plot(epochs, [statistics.mean(r["student"][e - 1] for r in found) for e in epochs], label=arm.title)
        if found[0]["teacher"]:
            gaps = [statistics.mean(r["teacher"][e - 1] - r["student"][e - 1] for r in found) for e in epochs]
            right.plot(epochs, gaps, label=arm.title)
    left.set(xlabel="epoch", ylabel="student's accuracy, %")
    right.set(xlabel="epoch", ylabel="dynamic teacher ahead of its student, points")
    left.legend(fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
