"""The folded student in ONNX Runtime against the original: `python -m bench onnx [MODEL ...]`.

Both are exported by `export_onnx`, which compares each file with its module. The student comes from a teacher whose
branches are awake, and its file is also compared with the teacher's own student. Both files run in turn, on one
thread, many short runs of the same input, and which comes first alternates. The ratio's last word is the median.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import gpd_fx
from bench.compose import awaken
from bench.machine import prepare
from bench.measure import Case, Check, Row, measure
from bench.section import Section, report
from gpd_fx.io.models import resolve
from gpd_fx.verify.verification import relative_error

MODELS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:convnext_tiny",
    "timm:deit_tiny_patch16_224",
)
TOLERANCE = 1e-4
SAME = 0.01
"""How far the numbers of nodes and of bytes may be apart, relatively."""


def session(path: Path) -> Any:
    """The file in ONNX Runtime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Exported:
    """A module's file, and what there is to say about it."""

    def __init__(self, module: nn.Module, path: Path, image: Tensor) -> None:
        self.report = gpd_fx.export_onnx(module, path, (image,))
        self.session = session(path)
        self.feeds = {self.session.get_inputs()[0].name: image.numpy()}

    def run(self) -> Any:
        """The first output."""
        return self.session.run(None, self.feeds)[0]

    def checks(self, expected: Tensor) -> list[Check]:
        """The file against its module, and against outputs on the image that is timed."""
        own = math.inf if self.report.max_error is None else self.report.max_error
        found = relative_error(expected, torch.as_tensor(self.run()))
        return [Check("file against module", own, TOLERANCE), Check("outputs", found, TOLERANCE)]


def run(
    model: str, resolution: int, rounds: int, ratio: float = 2.0, repeats: int = 1, until: float = math.inf
) -> Section:
    """Measure one model; `repeats` runs make one timing."""
    image = torch.randn(1, 3, resolution, resolution)
    original = resolve(model).eval()
    teacher = gpd_fx.expand(original, ratio, (image,), verify=False).eval()
    awaken(teacher.composition)
    with torch.no_grad():
        expected = original(image), teacher.student(image)
    with tempfile.TemporaryDirectory() as folder:
        first = Exported(original, Path(folder) / "original.onnx", image)
        second = Exported(gpd_fx.fold(teacher).eval(), Path(folder) / "student.onnx", image)
    nodes = second.report.nodes / first.report.nodes
    size = second.report.bytes / first.report.bytes

    def student_checks() -> list[Check]:
        same = [Check("nodes", abs(nodes - 1), SAME), Check("bytes", abs(size - 1), SAME)]
        return [*second.checks(expected[1]), *same]

    def repeated(exported: Exported) -> None:
        for _ in range(repeats):
            exported.run()

    # each file comes twice, in mirrored order: what a position is worth cancels out
    cases = [
        Case("original", lambda: repeated(first), lambda: first.checks(expected[0])),
        Case("student", lambda: repeated(second), student_checks),
        Case("student again", lambda: repeated(second), student_checks),
        Case("original again", lambda: repeated(first), lambda: first.checks(expected[0])),
    ]
    rows = measure(cases, rounds, torch.device("cpu"), until)
    merged = [_merge(rows[0], rows[3], repeats), _merge(rows[1], rows[2], repeats)]
    merged[0].figures |= {"nodes": first.report.nodes, "bytes": first.report.bytes}
    merged[1].figures |= {"nodes": second.report.nodes, "bytes": second.report.bytes}
    for row in merged:
        if row.seconds and merged[0].seconds:
            row.base = merged[0].name
            row.ratios = [a / b for a, b in zip(row.seconds, merged[0].seconds, strict=True)]
    options = {"model": model, "ratio": ratio, "branches": "orepa", "batch": 1, "resolution": resolution}
    return Section.of(
        "onnx",
        f"folded student of {model} in ONNX Runtime, batch 1, {resolution}x{resolution}",
        options | {"exporter": second.report.exporter, "opset": second.report.opset, "runs": repeats},
        merged,
        torch.device("cpu"),
    )


def _merge(one: Row, other: Row, repeats: int) -> Row:
    """The row of two halves of each round: seconds of a single run."""
    one.seconds = [(a + b) / 2 / repeats for a, b in zip(one.seconds, other.seconds, strict=True)]
    one.memory = None  # ONNX Runtime keeps its arena: a second call takes nothing
    return one


def main(
    models: Annotated[list[str] | None, typer.Argument(help="By default five.")] = None,
    resolution: Annotated[int, typer.Option(help="Side of the image.")] = 224,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 60,
    ratio: Annotated[float, typer.Option(help="Expansion ratio.")] = 2.0,
    repeats: Annotated[int, typer.Option(help="Runs that make one timing.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Compare the folded student's ONNX file with the original's."""
    chosen: Sequence[str] = models or MODELS
    prepare("cpu", 1)
    report([run(model, resolution, rounds, ratio, repeats) for model in chosen], out)
