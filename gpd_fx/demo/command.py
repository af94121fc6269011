"""`gpd-fx demo`, step by step: expand, train, choose, measure, write."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from gpd_fx.api.expansion import expand
from gpd_fx.demo.digits import TRAIN, VALIDATION, load_digits
from gpd_fx.demo.runs import ARMS, BATCH, RATES, Arm, Setting, best_rate, cost_ratio, new_student, train_all
from gpd_fx.demo.show import introduction, plot, print_table, verdict
from gpd_fx.demo.stages import measure, start_differences, wide_parameters
from gpd_fx.errors import ArgumentError, TrainingError
from gpd_fx.io.extras import need
from gpd_fx.io.files import write_text
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher

_PACKAGES: Final = ("sklearn", "accelerate", "timm", "onnxruntime", "onnxscript", "matplotlib")
_FILES: Final = "student.onnx, teacher.safetensors, report.txt, report.json, metrics.json, curves.png"


def demo(
    out: Path = Path("gpd-demo"),
    *,
    seeds: int = 5,
    epochs: int = 15,
    ratio: float = 2.0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo, print what it does, and write its files to the folder `out`.

    Returns:
        What `metrics.json` holds.

    Raises:
        ArgumentError: an option cannot be used, or a package is missing.
        TrainingError: every learning rate diverged.
    """
    for name, value in (("seeds", seeds), ("epochs", epochs)):
        if value < 1:
            raise ArgumentError(f"{name}={value} must be 1 or more")
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"out={str(out)!r} is a file; name a folder")
    shown, started = console or Console(), time.perf_counter()
    with shown.status("loading"):
        for package in _PACKAGES:  # now, not when everything is trained
            need(package, "the demo", "demo")
        setting = Setting(seeds, epochs, ratio, load_digits())
    out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        return _run(setting, out, shown, started)


def _run(setting: Setting, out: Path, console: Console, started: float) -> dict[str, Any]:
    console.print(introduction(setting))
    teachers = {seed: _expand(setting, seed, console) for seed in range(setting.seeds)}
    report = teachers[0].report()
    write_text(out / "report.txt", f"{report}\n")
    write_text(out / "report.json", json.dumps(report.to_dict(), indent=2))
    console.print(
        f"expanded: {report.student_parameters:,} -> {wide_parameters(report):,} parameters, coverage "
        f"{report.coverage:.4f}, largest relative error in float64 {report.max_error or 0.0:.1e}"
    )
    before = start_differences(setting, teachers)
    runs = train_all(setting, teachers, console)
    best: dict[Arm, float] = {arm: best_rate(runs, arm) for arm in ARMS}
    chosen = [run for run in runs if run.rate == best[run.arm]]
    for run in chosen:
        if run.diverged is not None:
            raise TrainingError(f"every learning rate diverged on some seed; at the lowest, {run.diverged}")
    rows, onnx = measure(setting, teachers, chosen, before, out, console)
    plot(setting, chosen, out / "curves.png")
    gains = [b - a for a, b in zip(rows[0].accuracies, rows[2].accuracies, strict=True)]
    cost, seconds = cost_ratio(runs), time.perf_counter() - started
    print_table(console, setting, rows, best, cost)
    console.print(f"\n[bold]{verdict(gains)}[/bold]", highlight=False)
    metrics = {
        "settings": {
            "seeds": setting.seeds,
            "epochs": setting.epochs,
            "ratio": setting.ratio,
            "batch_size": BATCH,
            "learning_rates": list(RATES),
            "images": {"train": TRAIN, "validation": VALIDATION, "test": len(setting.digits.test)},
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "learning_rate": best,
        "rows": [row.to_dict() for row in rows],
        "gains": gains,
        "mean_gain": statistics.fmean(gains),
        "verdict": verdict(gains),
        "step_cost_ratio": cost,
        "onnx": onnx,
        "seconds": seconds,
        "runs": [run.to_dict() for run in runs],
    }
    write_text(out / "metrics.json", json.dumps(metrics, indent=2))
    console.print(f"\n{_FILES} are in {out.resolve()} ({seconds:.0f} s)", highlight=False, soft_wrap=True)
    return metrics


def _expand(setting: Setting, seed: int, console: Console) -> DynamicTeacher:
    images, _ = setting.digits.train[:2]
    with console.status(f"seed {seed}: expanding the student and checking the result"):
        return expand(new_student(seed), setting.ratio, (images,), seed=seed)


@contextmanager
def _one_thread() -> Generator[None]:
    """One thread: on images this small, several wait for one another longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
