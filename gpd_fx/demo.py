"""`gpd-fx demo`: the whole path on real handwritten digits, in a few minutes on a laptop.

A small residual conv net is trained alone and, from the same start, on the same batches in the same order and for as
many updates, together with its dynamic teacher. Each arm takes the learning rate of one small grid that is best on the
validation images; what is compared is measured on test images, by which nothing was chosen. Then the student is
folded, exported to ONNX, and run in ONNX Runtime.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gpd_fx import ExpansionReport, expand, export_onnx, fold, save
from gpd_fx.digits import TRAIN, VALIDATION, Digits, load_digits
from gpd_fx.digits import DigitNet as DigitNet
from gpd_fx.errors import ArgumentError, TrainingError
from gpd_fx.files import write_text
from gpd_fx.losses import GPDLoss, cross_entropy
from gpd_fx.plots import Curve, Panel, plot_curves
from gpd_fx.teacher import DynamicTeacher
from gpd_fx.train import Epoch, Schedule, evaluate, fit
from gpd_fx.verify import relative_error

_BATCH: Final = 64
_RATES: Final = (0.03, 0.1, 0.3, 1.0)

Arm = Literal["alone", "gpd"]


@dataclass(frozen=True)
class Run:
    """One training of one arm, and the state that it ended in; one that diverged has no state and accuracy 0."""

    arm: Arm
    seed: int
    rate: float
    validation: float
    history: list[Epoch]
    state: dict[str, Tensor]
    diverged: str | None = None

    def __str__(self) -> str:
        if self.diverged is not None:
            return "diverged"
        metrics = self.history[-1].metrics
        return f"{metrics['student']:.2%}" + (f" (teacher {metrics['teacher']:.2%})" if self.arm == "gpd" else "")


@dataclass(frozen=True)
class Row:
    """A line of the final table: accuracies over the seeds, in percent."""

    stage: str
    accuracies: tuple[float, ...]
    parameters: int
    milliseconds: float
    difference: float | None

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 with one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def demo(
    out: Path = Path("gpd-demo"),
    *,
    seeds: int = 3,
    epochs: int = 40,
    ratio: float = 2.0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo, print what it does, and write its files to the folder `out`.

    Returns:
        What `metrics.json` holds.

    Raises:
        ArgumentError: an option cannot be used, or a package is missing.
    """
    if seeds < 1:
        raise ArgumentError(f"seeds={seeds} must be 1 or more")
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"out={str(out)!r} is a file; name a folder")
    Schedule(epochs, _RATES[0])  # refuses a bad number of epochs before anything is written
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with _one_thread():
        return _Demo(out, seeds, epochs, ratio, console or Console()).run(started)


@dataclass(frozen=True)
class _Demo:
    out: Path
    seeds: int
    epochs: int
    ratio: float
    console: Console

    def run(self, started: float) -> dict[str, Any]:
        digits = load_digits()
        self.console.print(self._introduction(digits))
        teachers = {seed: self._expand(seed, digits) for seed in range(self.seeds)}
        report = teachers[0].report()
        write_text(self.out / "report.txt", f"{report}\n")
        write_text(self.out / "report.json", json.dumps(report.to_dict(), indent=2))
        self.console.print(
            f"expanded: {report.student_parameters:,} -> {_wide(report):,} parameters, coverage "
            f"{report.coverage:.4f}, largest relative error in float64 {report.max_error or 0.0:.1e}"
        )
        starts = {seed: _copy(teacher.state_dict()) for seed, teacher in teachers.items()}
        before = self._differences_at_the_start(teachers, digits)
        runs = self._train(teachers, starts, digits)
        best: dict[Arm, float] = {arm: _best_rate(runs, arm) for arm in ("alone", "gpd")}
        chosen = [run for run in runs if run.rate == best[run.arm]]
        for run in chosen:
            if run.diverged is not None:
                raise TrainingError(f"every learning rate diverged on some seed; at the lowest, {run.diverged}")
        rows, report_onnx = self._measure(teachers, chosen, before, digits)
        self._plot(chosen)
        gains = [b - a for a, b in zip(rows[0].accuracies, rows[2].accuracies, strict=True)]
        cost = _seconds(runs, "gpd") / _seconds(runs, "alone")
        seconds = time.perf_counter() - started
        self._print_table(rows, best, digits, cost)
        self.console.print(f"\n[bold]{verdict(gains)}[/bold]", highlight=False)
        metrics = {
            "settings": {
                "seeds": self.seeds,
                "epochs": self.epochs,
                "ratio": self.ratio,
                "batch_size": _BATCH,
                "learning_rates": list(_RATES),
                "images": {"train": TRAIN, "validation": VALIDATION, "test": len(digits.test)},
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "learning_rate": best,
            "rows": [{**asdict(row), "mean": row.mean, "spread": row.spread} for row in rows],
            "gains": gains,
            "mean_gain": statistics.fmean(gains),
            "verdict": verdict(gains),
            "step_cost_ratio": cost,
            "onnx": report_onnx,
            "seconds": seconds,
            "runs": [
                {
                    "arm": run.arm,
                    "seed": run.seed,
                    "learning_rate": run.rate,
                    "validation": run.validation,
                    "diverged": run.diverged,
                    "history": [asdict(epoch) for epoch in run.history],
                }
                for run in runs
            ],
        }
        write_text(self.out / "metrics.json", json.dumps(metrics, indent=2))
        files = "student.onnx, teacher.safetensors, report.txt, report.json, metrics.json, curves.png"
        self.console.print(f"\n{files} are in {self.out.resolve()} ({seconds:.0f} s)", highlight=False, soft_wrap=True)
        return metrics

    def _introduction(self, digits: Digits) -> str:
        return (
            f"{TRAIN} training, {VALIDATION} validation and {len(digits.test)} test images of handwritten digits; "
            f"{self.seeds} seed{'s' * (self.seeds > 1)}, {self.epochs} epochs of {math.ceil(TRAIN / _BATCH)} updates, "
            f"ratio {self.ratio:g}, learning rates {', '.join(f'{rate:g}' for rate in _RATES)}"
        )

    def _expand(self, seed: int, digits: Digits) -> DynamicTeacher:
        images, _ = digits.train[:2]
        with self.console.status(f"seed {seed}: expanding the student and checking the result"):
            return expand(_student(seed), self.ratio, (images,), seed=seed)

    def _differences_at_the_start(self, teachers: dict[int, DynamicTeacher], digits: Digits) -> tuple[float, float]:
        """How far teacher and student are from the given model before training: at most, relative, over all seeds."""
        images, _ = digits.test[:]
        of_teacher = of_student = 0.0
        for seed, teacher in teachers.items():
            expected = _logits(_student(seed).eval(), images)
            of_teacher = max(of_teacher, relative_error(expected, _logits(teacher.eval(), images)))
            of_student = max(of_student, relative_error(expected, _logits(teacher.student, images)))
        return of_teacher, of_student

    def _train(
        self, teachers: dict[int, DynamicTeacher], starts: dict[int, dict[str, Tensor]], digits: Digits
    ) -> list[Run]:
        runs: list[Run] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            everything = progress.add_task("all runs", total=2 * self.seeds * len(_RATES))
            for seed, teacher in teachers.items():
                for rate in _RATES:
                    for arm in ("alone", "gpd"):
                        model = _student(seed) if arm == "alone" else teacher
                        if arm == "gpd":
                            teacher.load_state_dict(starts[seed])
                        runs.append(self._train_one(arm, model, seed, rate, digits, progress))
                        progress.update(everything, advance=1)
                    alone, gpd = runs[-2:]
                    progress.console.print(f"seed {seed}, rate {rate:g}: validation {alone} alone, {gpd} with GPD")
        return runs

    def _train_one(self, arm: Arm, model: nn.Module, seed: int, rate: float, digits: Digits, progress: Progress) -> Run:
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        try:
            history = fit(
                model,
                DataLoader(digits.train, _BATCH, shuffle=True, generator=order),
                Schedule(self.epochs, rate),
                cross_entropy if arm == "alone" else GPDLoss(),
                validate=lambda: evaluate(model, [cast("tuple[Tensor, Tensor]", digits.validation[:])]),
                progress=progress,
                title=f"seed {seed}, rate {rate:g}, {'student alone' if arm == 'alone' else 'with GPD'}",
            )
        except TrainingError as error:
            return Run(arm, seed, rate, 0.0, [], {}, str(error))
        return Run(arm, seed, rate, history[-1].metrics["student"], history, _copy(model.state_dict()))

    def _measure(
        self, teachers: dict[int, DynamicTeacher], chosen: list[Run], before: tuple[float, float], digits: Digits
    ) -> tuple[list[Row], dict[str, Any]]:
        """Test accuracy, time and differences of every stage; writes the files of the best seed on validation."""
        kept = max((run for run in chosen if run.arm == "gpd"), key=lambda run: run.validation).seed
        images, labels = digits.test[:]
        measured: list[list[tuple[float, float]]] = []  # by seed and stage: accuracy, milliseconds
        of_folded = of_onnx = 0.0
        onnx: dict[str, Any] = {}
        for seed, teacher in teachers.items():
            alone = _student(seed)
            for run in chosen:
                if run.seed == seed:
                    (alone if run.arm == "alone" else teacher).load_state_dict(run.state)
            folded = fold(teacher.eval()).eval()
            with self.console.status(f"seed {seed}: exporting to ONNX"), tempfile.TemporaryDirectory() as scratch:
                path = (self.out if seed == kept else Path(scratch)) / "student.onnx"
                report = export_onnx(folded, path, (images[:2],))
                runtime = _runtime(path)
            if seed == kept:
                onnx = report.to_dict()
                save(teacher, self.out / "teacher.safetensors")
            calls = (alone.eval(), teacher, teacher.student, folded, runtime)
            logits = [_logits(call, images) for call in calls]
            of_folded = max(of_folded, relative_error(logits[2], logits[3]))
            of_onnx = max(of_onnx, relative_error(logits[3], logits[4]))
            accuracies = [100 * (each.argmax(1) == labels).double().mean().item() for each in logits]
            measured.append(list(zip(accuracies, [_milliseconds(call, images) for call in calls], strict=True)))
        small, wide = _parameters(_student(0)), _wide(teachers[0].report())
        stages = (
            ("student alone", small, None),
            ("dynamic teacher", wide, before[0]),
            ("student with GPD", small, before[1]),
            ("folded student", small, of_folded),
            ("ONNX Runtime", small, of_onnx),
        )
        rows = [
            Row(name, tuple(accuracy for accuracy, _ in seeds), size, min(time for _, time in seeds), difference)
            for (name, size, difference), *seeds in zip(stages, *measured, strict=True)
        ]
        return rows, onnx

    def _plot(self, chosen: list[Run]) -> None:
        def curve(label: str, arm: Arm, value: Callable[[Epoch], float]) -> Curve:
            return Curve(label, [[value(epoch) for epoch in run.history] for run in chosen if run.arm == arm])

        accuracies = (
            curve("student alone", "alone", lambda epoch: 100 * epoch.metrics["student"]),
            curve("student with GPD", "gpd", lambda epoch: 100 * epoch.metrics["student"]),
            curve("dynamic teacher", "gpd", lambda epoch: 100 * epoch.metrics["teacher"]),
        )
        losses = (
            curve("student alone", "alone", lambda epoch: epoch.losses["task"]),
            curve("student with GPD", "gpd", lambda epoch: epoch.losses["task_student"]),
            curve("dynamic teacher", "gpd", lambda epoch: epoch.losses["task_teacher"]),
        )
        last = min(values[-1] for each in accuracies for values in each.runs)
        plot_curves(
            (
                Panel("validation accuracy (%)", accuracies, floor=max(0.0, last - 20)),  # the end is what matters
                Panel("training loss (cross-entropy)", losses),
            ),
            self.out / "curves.png",
            f"Handwritten digits, ratio {self.ratio:g}: mean over {self.seeds} seeds, band from lowest to highest",
        )

    def _print_table(self, rows: Sequence[Row], best: dict[Arm, float], digits: Digits, cost: float) -> None:
        table = Table(title="Handwritten digits, test images", caption_justify="left")
        for name in ("", "accuracy %", "parameters", "ms/image", "max difference"):
            table.add_column(name, justify="left" if not name else "right")
        for row in rows:
            difference = "-" if row.difference is None else f"{row.difference:.1e}"
            spread = f"{row.mean:.2f} ± {row.spread:.2f}"
            table.add_row(row.stage, spread, f"{row.parameters:,}", f"{row.milliseconds:.4f}", difference)
        self.console.print(table)
        self.console.print(
            f"Mean ± standard deviation over {self.seeds} seeds, {len(digits.test)} test images. Both arms: same "
            f"start, same batches in the same order, {self.epochs} epochs of {math.ceil(TRAIN / _BATCH)} updates of "
            f"{_BATCH} images, SGD with the same schedule, and the best of {len(_RATES)} learning rates on "
            f"{VALIDATION} validation images: {best['alone']:g} alone, {best['gpd']:g} with GPD. "
            f"A step with GPD took {cost:.1f} times as long. "
            f"Time: batches of {_BATCH}, one thread. Difference: largest, relative to the largest logit; teacher and "
            "student with GPD: from the model before training; folded: from the student with GPD; ONNX Runtime: from "
            "the folded student.",
            highlight=False,
        )


def verdict(gains: Sequence[float]) -> str:
    """Whether the student gained from GPD, in one plain sentence; `gains` are percentage points per seed."""
    mean, gained = statistics.fmean(gains), sum(gain > 0 for gain in gains)
    numbers = f"mean {mean:+.2f} points, per seed {', '.join(f'{gain:+.2f}' for gain in gains)}"
    if mean <= 0:
        return f"The student did not gain from GPD: {numbers}."
    if gained == len(gains):
        return f"The student gained from GPD on {'every' if gained > 1 else 'the one'} seed: {numbers}."
    return f"The student gained from GPD on average, but only on {gained} of {len(gains)} seeds: {numbers}."


def _student(seed: int) -> DigitNet:
    torch.manual_seed(seed)
    return DigitNet()


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(state)


def _best_rate(runs: Sequence[Run], arm: Arm) -> float:
    """The rate of the highest mean validation accuracy; the lower one where two are equal."""
    means = {rate: statistics.fmean(r.validation for r in runs if (r.arm, r.rate) == (arm, rate)) for rate in _RATES}
    return max(_RATES, key=lambda rate: (means[rate], -rate))


def _seconds(runs: Sequence[Run], arm: Arm) -> float:
    return sum(epoch.seconds for run in runs if run.arm == arm for epoch in run.history)


def _wide(report: ExpansionReport) -> int:
    """The dynamic teacher's parameters, those of its branches included."""
    return report.teacher_parameters + report.branch_parameters


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _logits(call: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    return call(images)


@torch.no_grad()
def _milliseconds(call: Callable[[Tensor], Any], images: Tensor) -> float:
    """The fastest of several passes over the images in batches, per image."""
    fastest = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for batch in images.split(_BATCH):
            call(batch)
        fastest = min(fastest, time.perf_counter() - started)
    return 1000 * fastest / len(images)


def _runtime(path: Path) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime on the file, as a function of the images."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name: str = session.get_inputs()[0].name
    return lambda images: torch.as_tensor(session.run(None, {name: images.numpy()})[0])


@contextmanager
def _one_thread() -> Generator[None]:
    """One thread: on images this small, several wait for one another longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
