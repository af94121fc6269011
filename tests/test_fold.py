"""Folding: the student comes out as a plain module of its own class."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gpd_fx
from gpd_fx.errors import FoldError
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.verify.verification import relative_error

Randomise = Callable[[nn.Module], nn.Module]
D = torch.float64


class Net(nn.Module):
    """Layers with and without bias, depthwise, grouped and transposed; norms; buffers; a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.group = nn.Conv2d(4, 8, (2, 1), groups=2, padding="same", padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4, 1, 1)) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(4, 1, 1))})
        self.register_buffer("kept", torch.rand(4, 1, 1))
        self.register_buffer("passing", torch.rand(4, 1, 1), persistent=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.depth(x) * self.scales[0] * self.get_buffer("kept")
        x = self.up(F.silu(self.group(x))) * self.scales[1] + self.named["shift"] * self.get_buffer("passing")
        return self.head(x.mean((2, 3)))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=D)


@pytest.fixture
def model(randomise: Randomise) -> nn.Module:
    return randomise(Net()).double()


def train(teacher: nn.Module, steps: int = 3) -> None:
    teacher.train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        wide, narrow = teacher(images(4), role="both")
        (wide.square().mean() + narrow.square().mean()).backward()
        optimizer.step()


@pytest.fixture
def trained(model: nn.Module) -> DynamicTeacher:
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    train(teacher)
    return teacher


@pytest.mark.parametrize("ratio", [1, 2.0, 1.5, 3.0])
@pytest.mark.parametrize("branches", [None, "orepa"])
def test_fold_after_expand_is_the_identity(model: nn.Module, ratio: float, branches: str | None) -> None:
    student = gpd_fx.fold(gpd_fx.expand(model, ratio, (images(),), branches=branches))
    assert list(student.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name
        assert tensor.dtype == student.state_dict()[name].dtype
    assert torch.equal(student.get_buffer("passing"), model.get_buffer("passing"))


def test_the_folded_student_is_the_teachers(trained: DynamicTeacher) -> None:
    student = gpd_fx.fold(trained).eval()
    fresh = Net().double().eval()
    fresh.load_state_dict(student.state_dict(), strict=True)
    fresh.get_buffer("passing").copy_(student.get_buffer("passing"))
    x = images(3)
    expected = trained.eval().student(x)
    assert type(student) is Net
    assert relative_error(expected, student(x)) <= 1e-9
    assert relative_error(expected, fresh(x)) <= 1e-9


def test_names_and_shapes_are_the_models(model: nn.Module, trained: DynamicTeacher) -> None:
    student = gpd_fx.fold(trained)
    shapes = {name: (type(p), p.shape) for name, p in model.named_parameters()}
    assert {name: (type(p), p.shape) for name, p in student.named_parameters()} == shapes
    assert student.get_submodule("stem").bias is None
    assert [name for name, _ in student.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert str(student) == str(model)


def test_a_folded_kernel_is_the_weight_plus_its_branches(trained: DynamicTeacher) -> None:
    student = gpd_fx.fold(trained)
    merged = trained.composition.merged()
    kernel = student.get_parameter("stem.weight")
    wide = trained.composition.weights.get_parameter("stem.weight")
    assert torch.equal(kernel, merged["stem.weight"][:4])
    assert not torch.allclose(kernel, wide[:4])  # the branches have trained


def test_statistics_are_the_students_own(trained: DynamicTeacher) -> None:
    student = gpd_fx.fold(trained)
    assert torch.equal(student.get_buffer("norm.running_mean"), trained.skeleton.get_buffer("norm.running_mean"))
    assert int(student.get_buffer("norm.num_batches_tracked")) == 3


def test_the_teacher_is_not_changed_and_shares_nothing(trained: DynamicTeacher) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    first, second = gpd_fx.fold(trained), gpd_fx.fold(trained)
    with torch.no_grad():
        for tensor in (*first.parameters(), *first.buffers()):
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert all(bool(p.abs().sum() > 0) for p in second.parameters())
    assert not list(trained.skeleton.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_teachers(trained: DynamicTeacher, training: bool) -> None:
    assert all(module.training is training for module in gpd_fx.fold(trained.train(training)).modules())


def test_a_folded_student_is_a_plain_model(trained: DynamicTeacher) -> None:
    student = gpd_fx.fold(trained)
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in student.parameters())
    x = images(3)
    expected = student.eval()(x)
    assert torch.equal(copy.deepcopy(student)(x), expected)
    file = io.BytesIO()
    torch.save(student.state_dict(), file)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student.train()(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(student.eval()(x), expected)


def test_a_folded_student_expands_again(trained: DynamicTeacher) -> None:
    student = gpd_fx.fold(trained).eval()
    again = gpd_fx.expand(student, 1.5, (images(),))
    x = images(3)
    for output in again.both(x):
        assert relative_error(student(x), output) <= 1e-9


def test_a_compiled_teacher(trained: DynamicTeacher) -> None:
    compiled = torch.compile(trained, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert type(gpd_fx.fold(compiled)) is Net


def test_a_distributed_teacher(model: nn.Module, tmp_path: Path) -> None:
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(teacher)
        train(parallel)
        students = [gpd_fx.fold(parallel), gpd_fx.fold(teacher)]
    finally:
        torch.distributed.destroy_process_group()
    for name, tensor in students[0].state_dict().items():
        assert torch.equal(tensor, students[1].state_dict()[name])


def test_wrappers_of_something_else_are_refused() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    with pytest.raises(FoldError, match=r"cannot fold a Wrapper; pass what gpd_fx\.expand or gpd_fx\.load returned"):
        gpd_fx.fold(Wrapper())


def test_an_averaged_teacher(trained: DynamicTeacher) -> None:
    average: Any = torch.optim.swa_utils.AveragedModel(trained)
    average.update_parameters(trained)
    assert type(gpd_fx.fold(average)) is Net
