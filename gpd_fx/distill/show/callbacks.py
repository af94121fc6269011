"""Who is told how a run goes: a progress bar, and in a folder's run the metrics and the console too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from gpd_fx.distill.loop.evaluation import Score
from gpd_fx.distill.show.metrics import Recorder


@dataclass(frozen=True)
class Epoch:
    """What one epoch showed.

    Attributes:
        epoch: its number, from 1.
        update: all updates that were done by its end.
        learning_rate: of the update after it.
        losses: their means over the epoch's updates, by name, with "total"; each is already times its weight.
        seconds: that its updates took.
        scores: on the test images, by network; empty where this epoch was not evaluated.
    """

    epoch: int
    update: int
    learning_rate: float
    losses: dict[str, float]
    seconds: float
    scores: dict[str, Score] = field(default_factory=dict[str, Score])

    def to_dict(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        line: dict[str, Any] = {
            "update": self.update,
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "losses": self.losses,
            "seconds": round(self.seconds, 3),
        }
        if self.scores:
            line["accuracy"] = {name: each.top1 for name, each in self.scores.items()}
            line["test_loss"] = {name: each.loss for name, each in self.scores.items()}
        if "teacher" in self.scores:
            line["gap"] = self.scores["teacher"].top1 - self.scores["student"].top1
        return line

    def __str__(self) -> str:
        accuracy = ", ".join(f"{name} {100 * each.top1:.2f}" for name, each in self.scores.items())
        return (
            f"loss {self.losses['total']:.4f}, learning rate {self.learning_rate:.2e}, {self.seconds:.0f} s"
            f"{f'; accuracy % {accuracy}' if accuracy else ''}"
        )


class Watcher:
    """Is told how a run goes, and does nothing with it."""

    def updated(self, update: int, learning_rate: float, losses: Mapping[str, float]) -> None:
        """So many updates are done; the last had these losses."""

    def ended(self, epoch: Epoch) -> None:
        """An epoch is done."""


class Bar(Watcher):
    """Shows the updates as a bar.

    Args:
        progress: where; it need not be started yet.
        title: what the bar is called.
        done: updates done so far.
        total: all updates of the run.
    """

    def __init__(self, progress: Progress, title: str, done: int, total: int) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task(title, total=total, completed=done)

    def updated(self, update: int, learning_rate: float, losses: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=update)

    def remove(self) -> None:
        """Take the bar away."""
        self._progress.remove_task(self._task)


class Reporter(Watcher):
    """Writes what a run shows to its metrics and to the console, beside a bar.

    Args:
        bar: the bar.
        recorder: of the main process.
        console: where a line is printed each epoch.
        log_every: updates between two lines of metrics; 0: only those of the epochs.
        epochs: of the run.
    """

    def __init__(self, bar: Bar, recorder: Recorder, console: Console, log_every: int, epochs: int) -> None:
        self._bar, self._recorder, self._console = bar, recorder, console
        self._log_every, self._epochs = log_every, epochs

    def updated(self, update: int, learning_rate: float, losses: Mapping[str, float]) -> None:
        self._bar.updated(update, learning_rate, losses)
        if self._log_every and update % self._log_every == 0:
            self._recorder.write({"update": update, "learning_rate": learning_rate, "losses": dict(losses)})

    def ended(self, epoch: Epoch) -> None:
        self._recorder.write(epoch.to_dict())
        self._console.print(f"epoch {epoch.epoch}/{self._epochs}: {epoch}", highlight=False)
