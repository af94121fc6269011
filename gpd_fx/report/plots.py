"""Pictures of a training run, drawn with matplotlib without a display."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from gpd_fx.errors import ArgumentError
from gpd_fx.io.files import output_path, publish, staging


@dataclass(frozen=True)
class Curve:
    """One quantity over the epochs, once per seed; drawn as the mean with a band from the lowest to the highest."""

    label: str
    runs: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes; what lies below `floor` is cut off."""

    label: str
    curves: Sequence[Curve]
    floor: float | None = None


def plot_curves(panels: Sequence[Panel], path: str | os.PathLike[str], title: str) -> None:
    """Write the panels side by side, curves over epochs (from 1), to the PNG or SVG file `path`.

    Raises:
        ArgumentError: matplotlib is missing, or `path` cannot be written.
    """
    target = output_path(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(
            f"plots need matplotlib, which cannot be imported ({error}); install it with pip install 'gpd_fx[demo]'"
        ) from error
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for curve in panel.curves:
            epochs = range(1, len(curve.runs[0]) + 1)
            columns = list(zip(*curve.runs, strict=True))
            (line,) = axis.plot(epochs, [sum(column) / len(column) for column in columns], label=curve.label)
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(xlabel="epoch", ylabel=panel.label)
        axis.set_ylim(bottom=panel.floor)  # after the curves: it ends autoscaling
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    with staging(target) as folder:
        draft = folder / target.name
        figure.savefig(draft, dpi=130)
        publish(draft, target)
