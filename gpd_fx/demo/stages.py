"""What became of the student at every stage, from training to ONNX Runtime, measured on the test images."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from gpd_fx.api.checkpoint import save
from gpd_fx.api.export import export_onnx
from gpd_fx.demo.runs import BATCH, Run, Setting, new_student
from gpd_fx.report.expansion_report import ExpansionReport
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.teacher.fold import fold
from gpd_fx.verify.verification import relative_error


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

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds of it."""
        return {**asdict(self), "mean": self.mean, "spread": self.spread}


def start_differences(setting: Setting, teachers: Mapping[int, DynamicTeacher]) -> tuple[float, float]:
    """How far teacher and student are from the given model before training: at most, relative, over all seeds."""
    images, _ = setting.digits.test[:]
    of_teacher = of_student = 0.0
    for seed, teacher in teachers.items():
        expected = _logits(new_student(seed).eval(), images)
        of_teacher = max(of_teacher, relative_error(expected, _logits(teacher.eval(), images)))
        of_student = max(of_student, relative_error(expected, _logits(teacher.student, images)))
    return of_teacher, of_student


def measure(
    setting: Setting,
    teachers: Mapping[int, DynamicTeacher],
    chosen: Sequence[Run],
    before: tuple[float, float],
    out: Path,
    console: Console,
) -> tuple[list[Row], dict[str, Any]]:
    """Test accuracy, time and differences of every stage; writes the files of the best seed on validation.

    Args:
        setting: of the demo.
        teachers: by seed; they take the states of the chosen runs.
        chosen: the runs at each arm's best rate.
        before: what `start_differences` gave.
        out: the folder for the files.
        console: for a word on what takes time.

    Returns:
        The table's rows, and what the export of the written file reports.
    """
    kept = max((run for run in chosen if run.arm == "gpd"), key=lambda run: run.validation).seed
    images, labels = setting.digits.test[:]
    measured: list[list[tuple[float, float]]] = []  # by seed and stage: accuracy, milliseconds
    of_folded = of_onnx = 0.0
    onnx: dict[str, Any] = {}
    for seed, teacher in teachers.items():
        alone = new_student(seed)
        for run in chosen:
            if run.seed == seed:
                (alone if run.arm == "alone" else teacher).load_state_dict(run.state)
        folded = fold(teacher.eval()).eval()
        with console.status(f"seed {seed}: exporting to ONNX"), tempfile.TemporaryDirectory() as scratch:
            path = (out if seed == kept else Path(scratch)) / "student.onnx"
            report = export_onnx(folded, path, (images[:2],))
            runtime = _runtime(path)
        if seed == kept:
            onnx = report.to_dict()
            save(teacher, out / "teacher.safetensors")
        calls = (alone.eval(), teacher, teacher.student, folded, runtime)
        logits = [_logits(call, images) for call in calls]
        of_folded = max(of_folded, relative_error(logits[2], logits[3]))
        of_onnx = max(of_onnx, relative_error(logits[3], logits[4]))
        accuracies = [100 * (each.argmax(1) == labels).double().mean().item() for each in logits]
        measured.append(list(zip(accuracies, [_milliseconds(call, images) for call in calls], strict=True)))
    small, wide = _parameters(new_student(0)), wide_parameters(teachers[0].report())
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


def wide_parameters(report: ExpansionReport) -> int:
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
        for batch in images.split(BATCH):
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
