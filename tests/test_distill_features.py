"""Features picked by name, and ReviewKD against its formulas written a second time with loops."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gpd_fx import expand, fold
from gpd_fx.distill import distill
from gpd_fx.distill.loop.networks import with_reviews
from gpd_fx.distill.losses.feature_taps import TeacherTaps, watched
from gpd_fx.distill.losses.review import Review, as_map, hierarchical_context
from gpd_fx.distill.losses.static_teacher import StaticTeacher
from gpd_fx.distill.show.metrics import read_metrics
from gpd_fx.errors import ArgumentError
from tests.distill_data import Net, config, images


def context_reference(features: Tensor, target: Tensor) -> float:
    """Grids of 4, 2 and 1, where they are smaller than the map, with loops over cells."""
    height, width = features.shape[2:]
    loss, weight, total = ((features - target) ** 2).mean().item(), 1.0, 1.0
    for grid in (4, 2, 1):
        if grid < height:
            weight /= 2
            squares: list[float] = []
            for row, column in itertools.product(range(grid), repeat=2):
                # torch's adaptive pooling: from floor(i n / g) to ceil((i + 1) n / g)
                rows = slice(row * height // grid, -(-(row + 1) * height // grid))
                columns = slice(column * width // grid, -(-(column + 1) * width // grid))
                gap = features[:, :, rows, columns].mean((2, 3)) - target[:, :, rows, columns].mean((2, 3))
                squares.append((gap**2).mean().item())
            loss += weight * sum(squares) / len(squares)
            total += weight
    return loss / total


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (4, 4), (7, 7), (9, 6)])
def test_the_hierarchical_context_loss_is_its_formula(size: tuple[int, int]) -> None:
    first, second = (torch.randn(3, 4, *size, dtype=torch.float64).requires_grad_() for _ in range(2))
    loss = hierarchical_context(first, second)
    assert loss.item() == pytest.approx(context_reference(first.detach(), second.detach()))
    loss.backward()
    assert second.grad is None


def normalised(x: Tensor) -> Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5) ** 0.5


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    rows = [i * x.shape[2] // height for i in range(height)]
    columns = [i * x.shape[3] // width for i in range(width)]
    return x[:, :, rows][:, :, :, columns]


def review_reference(review: Review, features: list[Tensor], targets: list[Tensor]) -> float:
    state = {name: value.detach() for name, value in review.state_dict().items()}
    total, below = 0.0, None
    for level in reversed(range(len(features))):
        part = {
            name.removeprefix(f"levels.{level}."): v for name, v in state.items() if name.startswith(f"levels.{level}.")
        }
        x = normalised(torch.einsum("nchw,oc->nohw", features[level], part["enter.0.weight"][:, :, 0, 0]))
        if below is not None:
            below = nearest(below, *x.shape[2:])
            kernel = part["attend.0.weight"][:, :, 0, 0]
            joined = torch.cat([x, below], 1)
            maps = torch.sigmoid(torch.einsum("nchw,oc->nohw", joined, kernel) + part["attend.0.bias"].view(1, 2, 1, 1))
            x = x * maps[:, 0:1] + below * maps[:, 1:2]
        below = x
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        out = torch.zeros(())
        for i, j in itertools.product(range(3), repeat=2):
            window = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            out = out + torch.einsum("nchw,oc->nohw", window, part["leave.0.weight"][:, :, i, j])
        total += context_reference(nearest(normalised(out), *targets[level].shape[2:]), targets[level])
    return total


def test_review_is_its_formula() -> None:
    torch.manual_seed(0)
    features = [torch.randn(4, c, s, s, dtype=torch.float64) for c, s in ((3, 8), (5, 4), (6, 2))]
    targets = [torch.randn(4, c, s, s, dtype=torch.float64) for c, s in ((4, 8), (7, 5), (9, 2))]
    review = Review([3, 5, 6], [4, 7, 9]).double().train()
    loss = review(features, targets)
    assert loss.item() == pytest.approx(review_reference(review, features, targets))
    loss.backward()
    unused = [name for name, parameter in review.named_parameters() if parameter.grad is None]
    assert not unused


def test_vectors_and_tokens_are_maps_too() -> None:
    assert as_map(torch.zeros(2, 5)).shape == (2, 5, 1, 1)
    tokens = torch.randn(2, 9, 5)
    assert as_map(tokens)[1, :, 2, 0].equal(tokens[1, 6])
    assert as_map(torch.zeros(2, 10, 5)).shape == (2, 5, 10, 1)
    with pytest.raises(ArgumentError, match="neither maps, tokens nor vectors"):
        as_map(torch.zeros(2, 3, 4, 5, 6))


class Residual(nn.Module):
    """Names below names, a sum, a module used twice, one that is not used, one with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.unused = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        return self.head(x.mean((2, 3)))


def residual(randomise: Any) -> Residual:
    model = randomise(Residual().double())
    model.unused.requires_grad_(False)
    return model


def test_the_teachers_features_begin_as_copies_of_the_students(randomise: Any) -> None:
    """The student's channels come first in every widened axis, so they are the teacher's leading ones at the start."""
    names = ["stem.0", "stem", "block", "head"]
    model = residual(randomise)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    teacher = expand(model, 2.0, (x,)).train()
    with pytest.raises(ArgumentError, match="node 'add' lies inside the model itself and is no module's output"):
        TeacherTaps(teacher, ["add"])
    taps = TeacherTaps(teacher, names)
    with taps.watching() as (narrow, wide):
        teacher.both(x)
    with watched(model.train(), names) as found:
        model(x)
    for mine, goal in zip(narrow, found, strict=True):
        torch.testing.assert_close(mine, goal, rtol=1e-10, atol=1e-12)
    for small, large in zip(narrow[:3], wide[:3], strict=True):
        assert large.shape[1] == 2 * small.shape[1]
        torch.testing.assert_close(large[:, : small.shape[1]], small, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(narrow[3], wide[3], rtol=1e-10, atol=1e-12)
    nodes = [node.name for node in teacher.graphs["train_mode"].graph.nodes]  # type: ignore[union-attr]
    taps.remove()
    by_node = TeacherTaps(teacher, ["batch_norm_1"])
    assert by_node.names == ["block.1"]
    by_node.remove()
    assert len(nodes) == len(teacher.graphs["train_mode"].graph.nodes) + 4  # type: ignore[union-attr,arg-type]
    assert not any(layer._forward_hooks for layer in teacher.modules())  # pyright: ignore[reportPrivateUsage]
    assert type(fold(teacher)) is Residual


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch 2.11 of itself, as it compiles
def test_names_that_mean_nothing(randomise: Any) -> None:
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    model = residual(randomise)
    teacher = expand(model, 2.0, (x,), verify=False)
    with pytest.raises(ArgumentError, match="no module or node 'blocks'; close to it: block"):
        TeacherTaps(teacher, ["blocks"])
    with pytest.raises(ArgumentError, match="the student has no module 'blocks'; close to it: block"):
        with_reviews(model, ["blocks"], x, [x])
    with pytest.raises(ArgumentError, match="'unused' was not called"):
        with_reviews(model, ["unused"], x, [x])
    with pytest.raises(ArgumentError, match="neither compiled nor an ONNX file"):
        StaticTeacher(model, compiled=True).pick(["block"], x)


def test_features_of_a_static_teacher_by_module_or_node(randomise: Any) -> None:
    model = residual(randomise)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    static = StaticTeacher(model)
    static.pick(["block", "stem"], x)
    logits, (block, stem) = static.features(x)
    torch.testing.assert_close(stem, model.eval().stem(x))
    torch.testing.assert_close(block, model.block(stem))
    torch.testing.assert_close(logits, model(x))
    static.pick(["mean", "stem"], x)
    again, (mean, stem) = static.features(x)
    torch.testing.assert_close(again, logits)
    torch.testing.assert_close(mean, torch.relu(stem + block).mean((2, 3)))
    torch.testing.assert_close(model.head(mean), logits)
    assert not mean.requires_grad


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_with_features(alone: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("timm")
    torch.manual_seed(0)
    student, static = Net(dropout=0.0), Net(width=7)
    setup = config(features=[["stem", "norm"], ["body", "body"]], alone=alone, epochs=4, weights={"features": 0.5})
    options: dict[str, Any] = {"student": student, "static": static, "console": Console(file=io.StringIO())}
    results = distill(setup, tmp_path / "run", images=images(), **options)
    lines = [line["losses"] for line in read_metrics(tmp_path / "run") if "epoch" in line]
    names = ["features_student"] if alone else ["features_student", "features_teacher"]
    assert [name for name in lines[0] if name.startswith("features")] == names
    for name in names:
        assert lines[-1][name] < lines[0][name]
    assert results.student.state_dict().keys() == student.state_dict().keys()
    assert not any(layer._forward_hooks for layer in results.student.modules())  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(ArgumentError, match=r"name one \(static_teacher\)"):
        distill(setup, tmp_path / "other", images=images(), student=student)
