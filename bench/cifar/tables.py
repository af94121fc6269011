"""The tables of the runs: accuracies by arm, and what each learning rate gave on the held-out images."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.cifar.arms import ARMS
from bench.markdown import table

COLUMNS = ("arm", "rate", "runs", "student", "gain", "over", "seeds ahead", "dynamic teacher", "ahead by", "cost")
Records = Sequence[dict[str, Any]]


def best_rate(records: Records, arm: str) -> float:
    """The rate with the best accuracy on held-out images, the mean of its runs.

    Raises:
        SystemExit: no rate is any good.
    """
    found = {rate: runs for rate, runs in chosen_by(records, arm).items() if all(run["student"] for run in runs)}
    if not found:
        raise SystemExit(f"{arm} diverged at every learning rate; give lower ones")
    return max(found, key=lambda rate: statistics.mean(run["student"][-1] for run in found[rate]))


def chosen_by(records: Records, arm: str) -> dict[float, list[dict[str, Any]]]:
    """The runs on held-out images of an arm, by their rates."""
    found: dict[float, list[dict[str, Any]]] = {}
    for record in records:
        if record["arm"] == arm and record["tuning"]:
            found.setdefault(record["rate"], []).append(record)
    return found


def finals(records: Records, name: str) -> Records:
    """The runs of an arm at its best rate, in the order of their seeds; those that diverged are left out."""
    found = [r for r in records if r["arm"] == name and not r["tuning"] and r["student"]]
    if len({r["rate"] for r in found}) > 1:
        rate = best_rate(records, name)
        found = [r for r in found if r["rate"] == rate]
    return sorted(found, key=lambda r: r["seed"])


def rows_of(records: Records, names: Iterable[str] = ARMS) -> list[list[str]]:
    """One row an arm: accuracies of the last epoch, mean and standard deviation over seeds; a run's median cost."""
    alone = finals(records, "alone")
    cost = statistics.median(r["seconds"] for r in alone) if alone else None
    rows: list[list[str]] = []
    for name in names:
        found, arm = finals(records, name), ARMS[name]
        if not found:
            continue
        other = {r["seed"]: r["folded"] for r in finals(records, arm.against)}
        gains = [r["folded"] - other[r["seed"]] for r in found if r["seed"] in other]
        teachers = [r["teacher"][-1] for r in found if r["teacher"]]
        ahead = [r["teacher"][-1] - r["student"][-1] for r in found if r["teacher"]]
        seconds = statistics.median(r["seconds"] for r in found)
        rows.append(
            [
                arm.title,
                f"{found[0]['rate']:g}",
                str(len(found)),
                spread([r["folded"] for r in found]),
                spread(gains, "+") if gains else "",
                ARMS[arm.against].title if gains else "",
                f"{sum(gain > 0 for gain in gains)} of {len(gains)}" if gains else "",
                spread(teachers) if teachers else "",
                spread(ahead, "+") if ahead else "",
                f"{seconds:.0f} s" + (f", {seconds / cost:.2f}x" if cost else ""),
            ]
        )
    return rows


def rates_of(records: Records) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the accuracies on held-out images, an arm a row and a learning rate a column."""
    rates = sorted({r["rate"] for r in records if r["tuning"]})
    rows: list[list[str]] = []
    for name, arm in ARMS.items():
        mine = {rate: _held_out(runs) for rate, runs in chosen_by(records, name).items()}
        if mine:
            rows.append([arm.title, *(mine.get(rate, "") for rate in rates)])
    return ["arm", *(f"{rate:g}" for rate in rates)], rows


def _held_out(runs: Records) -> str:
    """The mean accuracy of some runs, and how many there are where that is more than one."""
    if not all(run["student"] for run in runs):
        return "diverged"
    mean = f"{statistics.mean(run['student'][-1] for run in runs):.2f}"
    return mean if len(runs) == 1 else f"{mean} ({len(runs)} runs)"


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    text = f"{statistics.mean(values):{sign}.2f}"
    return f"{text} ± {statistics.stdev(values):.2f}" if len(values) > 1 else text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a page."""
    return "\n".join(table(head, rows)) + "\n"
