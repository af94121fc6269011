"""What the demo says: the table, the curves, and the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpd_fx.demo.digits import TRAIN, VALIDATION
from gpd_fx.demo.runs import BATCH, RATES, UPDATES, Arm, Run, Setting
from gpd_fx.demo.stages import Row
from gpd_fx.distill import Epoch
from gpd_fx.report.plots import Curve, Panel, plot_curves


def introduction(setting: Setting) -> str:
    """What is about to be done."""
    return (
        f"{TRAIN} training, {VALIDATION} validation and {len(setting.digits.test)} test images of handwritten digits; "
        f"{setting.seeds} seed{'s' * (setting.seeds > 1)}, {setting.epochs} epochs of {UPDATES} updates, "
        f"ratio {setting.ratio:g}, learning rates {', '.join(f'{rate:g}' for rate in RATES)}"
    )


def verdict(gains: Sequence[float]) -> str:
    """Whether the student gained from GPD, in one plain sentence; `gains` are percentage points per seed."""
    mean, gained = statistics.fmean(gains), sum(gain > 0 for gain in gains)
    numbers = f"mean {mean:+.2f} points, per seed {', '.join(f'{gain:+.2f}' for gain in gains)}"
    if round(mean, 2) <= 0:  # as it is printed
        return f"The student did not gain from GPD: {numbers}."
    if gained == len(gains):
        return f"The student gained from GPD on {'every' if gained > 1 else 'the one'} seed: {numbers}."
    return f"The student gained from GPD on average, but only on {gained} of {len(gains)} seeds: {numbers}."


def print_table(
    console: Console, setting: Setting, rows: Sequence[Row], best: Mapping[Arm, float], cost: float
) -> None:
    """Print the stages side by side, and how they were measured."""
    table = Table(title="Handwritten digits, test images", caption_justify="left")
    for name in ("", "accuracy %", "parameters", "ms/image", "max difference"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        difference = "-" if row.difference is None else f"{row.difference:.1e}"
        spread = f"{row.mean:.2f} ± {row.spread:.2f}"
        table.add_row(row.stage, spread, f"{row.parameters:,}", f"{row.milliseconds:.4f}", difference)
    console.print(table)
    seeds = f"{setting.seeds} seed{'s' * (setting.seeds > 1)}"
    console.print(
        f"Mean ± standard deviation over {seeds}, {len(setting.digits.test)} test images. Both arms: same start, same "
        f"batches in the same order, {setting.epochs} epochs of {UPDATES} updates of {BATCH} images, SGD with the same "
        f"schedule, and the best of {len(RATES)} learning rates on {VALIDATION} validation images: {best['alone']:g} "
        f"alone, {best['gpd']:g} with GPD. A step with GPD took {cost:.1f} times as long. "
        f"Time: batches of {BATCH}, one thread. Difference: largest, relative to the largest logit; teacher and "
        "student with GPD: from the model before training; folded: from the student with GPD; ONNX Runtime: from "
        "the folded student.",
        highlight=False,
    )


def plot(setting: Setting, chosen: Sequence[Run], path: Path) -> None:
    """Draw accuracies and losses of the chosen runs over the epochs."""

    def curve(label: str, arm: Arm, value: Callable[[Epoch], float]) -> Curve:
        return Curve(label, [[value(epoch) for epoch in run.history] for run in chosen if run.arm == arm])

    accuracies = (
        curve("student alone", "alone", lambda epoch: 100 * epoch.scores["student"].top1),
        curve("student with GPD", "gpd", lambda epoch: 100 * epoch.scores["student"].top1),
        curve("dynamic teacher", "gpd", lambda epoch: 100 * epoch.scores["teacher"].top1),
    )
    losses = (
        curve("student alone", "alone", lambda epoch: epoch.losses["task_student"]),
        curve("student with GPD", "gpd", lambda epoch: epoch.losses["task_student"]),
        curve("dynamic teacher", "gpd", lambda epoch: epoch.losses["task_teacher"]),
    )
    last = min(values[-1] for each in accuracies for values in each.runs)
    seeds = f"mean over {setting.seeds} seeds, band from lowest to highest" if setting.seeds > 1 else "one seed"
    plot_curves(
        (
            Panel("validation accuracy (%)", accuracies, floor=max(0.0, last - 20)),  # the end is what matters
            Panel("training loss (cross-entropy)", losses),
        ),
        path,
        f"Handwritten digits, ratio {setting.ratio:g}: {seeds}",
    )
