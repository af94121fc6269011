"""What a run records: lines of JSON, TensorBoard where it is installed, and curves at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from gpd_fx.errors import ArgumentError
from gpd_fx.io.files import write_text
from gpd_fx.report.plots import Curve, Panel, plot_curves

FILE: Final = "metrics.jsonl"


class Recorder:
    """Appends to the metrics of a run; lines after `update`, or cut off, are those of a run that was killed and go."""

    def __init__(self, folder: Path, update: int) -> None:
        self._path = folder / FILE
        kept = [line for line in read_metrics(folder) if line["update"] <= update]
        write_text(self._path, "".join(f"{json.dumps(line)}\n" for line in kept))
        self._board = _board(folder / "tensorboard", update)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line, which has the number of its update as "update", and hand it to the system at once."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
        if self._board is not None:
            for name, value in _scalars(line):
                self._board.add_scalar(name, value, line["update"])
            self._board.flush()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics."""
    path = folder / FILE
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # the last one, of a run that was killed
            break
    return lines


def plot_metrics(folder: Path, lines: Sequence[Mapping[str, Any]], title: str) -> list[Path]:
    """Draw accuracies and losses over the epochs as SVG and PNG; nothing without matplotlib or before an epoch ends."""
    epochs = [line for line in lines if "epoch" in line]
    shown = [line for line in epochs if line.get("accuracy")]
    if not shown or importlib.util.find_spec("matplotlib") is None:
        return []
    accuracies = [
        Curve(name.replace("_", " "), [[100 * line["accuracy"][name] for line in shown]])
        for name in shown[0]["accuracy"]
    ]
    losses = [
        Curve(name.replace("_", " "), [[line["losses"][name] for line in epochs]]) for name in epochs[0]["losses"]
    ]
    files = [folder / "curves.svg", folder / "curves.png"]
    for file in files:
        plot_curves((Panel("accuracy (%)", accuracies), Panel("training losses", losses)), file, title)
    return files


def _board(folder: Path, update: int) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard.writer import SummaryWriter  # imports tensorboard

    return SummaryWriter(str(folder), purge_step=update + 1)


def _scalars(line: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, Mapping):
            found += _scalars(cast("Mapping[str, Any]", value), f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "update":
            found.append((f"{prefix}{name}", float(value)))
    return found


@contextlib.contextmanager
def new_run(folder: Path, resume: bool) -> Generator[None]:
    """Make the folder of a run; where what is done meanwhile fails, nothing that was made is left.

    Raises:
        ArgumentError: it holds a run already, or cannot be made; or there is none to take up.
    """
    there = (folder / "config.yaml").exists()
    if resume and not there:
        raise ArgumentError(f"{str(folder)!r} holds no run to take up: there is no config.yaml in it")
    if there and not resume:
        raise ArgumentError(f"{str(folder)!r} holds a run already; take it up with --resume, or name another folder")
    places = [folder / "checkpoints", folder, *folder.parents]
    made = [place for place in places if not place.exists()]
    try:
        os.makedirs(places[0], exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"the folder {str(folder)!r} cannot be made: {error}") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something else has been put into it
            for place in made:
                place.rmdir()
        raise
