"""Depthwise convs fused with their batch norms: the same wide graphs in both modes, and what stays two ops and why."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import gpd_fx
from gpd_fx.kernels.depthwise import launch as depthwise_launch
from gpd_fx.kernels.depthwise import op as depthwise
from gpd_fx.passes import FuseDepthwise, Merge
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.verify.verification import relative_error
from tests.test_schedule import awaken
from tests.tiles import interpreted, traffic

# triton 3.6 makes numbers of arrays in a way that numpy warns about
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
KERNELS = ["3.weight", "8.weight"]


def mobile() -> nn.Sequential:
    """Two depthwise convs with batch norm, one strided and with a bias, between 1x1 convs."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6()),
        *(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU6()),
        *(nn.Conv2d(4, 4, 1), nn.Hardswish()),
        *(nn.Conv2d(4, 4, (3, 5), stride=(2, 1), padding=2, groups=4), nn.BatchNorm2d(4, momentum=0.3, affine=False)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


def teacher_of(randomise: Callable[[nn.Module], nn.Module], dtype: torch.dtype = torch.float64) -> DynamicTeacher:
    model = randomise(mobile()).to(dtype)
    return awaken(gpd_fx.expand(model, 1.5, (torch.randn(2, 3, 7, 6, dtype=dtype),), verify=False))


def results(teacher: DynamicTeacher, x: Tensor, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Outputs of both networks, the gradient of every parameter, and all buffers afterwards."""
    teacher.zero_grad()
    wide, narrow = (call or teacher)(x, role="both")
    (wide.sin().sum() + narrow.cos().sum()).backward()
    found = {name: p.grad.clone() for name, p in teacher.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    return found | {"wide": wide.detach(), "narrow": narrow.detach()}


def codes(teacher: DynamicTeacher) -> list[str]:
    return [graph.code for graph in teacher.graphs.values() if isinstance(graph, fx.GraphModule)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes the kernels, and they run under the interpreter."""
    interpreted()
    monkeypatch.setattr(depthwise, "usable", depthwise.fitting)


def test_both_networks_are_the_same(randomise: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    teacher, x = teacher_of(randomise), torch.randn(5, 3, 7, 6, dtype=torch.float64)
    keys, plain = list(teacher.state_dict()), codes(teacher)
    twin = copy.deepcopy(teacher)
    report = teacher.fuse()
    assert report.fused == tuple((mode, name) for mode in ("eval", "train") for name in KERNELS)
    assert str(report).startswith("4 of 4 depthwise convs run as one op with their batch norm")
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["reason"] == "with batch_norm_1"
    assert all("depthwise_norm" in code for code in codes(teacher))
    assert list(teacher.state_dict()) == keys
    for mode in (True, False):
        found, expected = (results(t.train(mode), x) for t in (teacher, twin))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    again = copy.deepcopy(teacher)
    for name, tensor in results(again, x).items():
        assert torch.equal(tensor, results(twin, x)[name])
    for mine, theirs in zip(
        gpd_fx.fold(teacher).state_dict().values(), gpd_fx.fold(twin).state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    gpd_fx.save(teacher, tmp_path / "teacher.safetensors")
    loaded = gpd_fx.load(tmp_path / "teacher.safetensors", mobile().double())
    assert not any("depthwise_norm" in code for code in codes(loaded))
    assert torch.equal(loaded.eval()(x), teacher.eval()(x))
    assert (
        relative_error(teacher(x), Merge()(teacher.as_graph()).graph_module(x)) < 1e-12
    )  # as a graph of its own, all is two ops
    assert teacher.fuse(False).rows == ()
    assert codes(teacher) == plain


def test_fused_and_apart(randomise: Callable[[nn.Module], nn.Module]) -> None:
    """A conv with a branch beside it stays two ops; which branches can run apart does not depend on what is fused."""
    teacher, x = teacher_of(randomise), torch.randn(5, 3, 7, 6, dtype=torch.float64)
    expected = results(copy.deepcopy(teacher), x)
    teacher.fuse()
    teacher.run_apart([("8.weight", "1x1-kxk")])
    assert all("depthwise_norm" in code and "addcmul" in code for code in codes(teacher))
    for name, tensor in results(teacher, x).items():
        assert (tensor - expected[name]).abs().max() <= 1e-12 * max(1.0, expected[name].abs().max().item())
    rows = {(row.mode, row.parameter): row for row in teacher.fuse().rows}
    assert rows["train", "8.weight"].reason == "its output has 2 users"
    assert rows["train", "3.weight"].runs == "fused"
    teacher.schedule(torch.empty(64, 3, 7, 6, dtype=torch.float64, device="meta"))
    assert teacher.apart == frozenset()
    assert all(code.count("depthwise_norm(") == 2 for code in codes(teacher))


@pytest.mark.usefixtures("kernels")
def test_the_kernels_run_in_the_wide_graph(randomise: Callable[[nn.Module], nn.Module]) -> None:
    teacher, x = teacher_of(randomise, torch.float32), torch.randn(3, 3, 7, 6)
    expected = results(copy.deepcopy(teacher).double(), x.double())
    teacher.fuse()
    with traffic(depthwise_launch) as counted:
        found = results(teacher, x)
    assert (
        counted.launches.count("normalise") == counted.launches.count("differentiate_conv") == 2
    )  # the student has its own ops
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-5 * max(tensor.abs().max().item(), 1.0), name


@pytest.mark.usefixtures("kernels")
def test_compiled_as_one_graph(randomise: Callable[[nn.Module], nn.Module]) -> None:
    teacher, x = teacher_of(randomise, torch.float32), torch.randn(3, 3, 7, 6)
    teacher.fuse()
    called: list[Any] = []

    def backend(graph: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        called.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch.compile(teacher, fullgraph=True, backend=backend)(x, role="both")
    assert called.count(torch.ops.gpd_fx.depthwise_norm.default) == 2  # the teacher's
    convs = [target for target in called if target in (torch.conv2d, torch.ops.aten.conv2d.default)]
    assert len(convs) == 2 + 4  # two of each network are not depthwise


class Odd(nn.Module):
    """One depthwise conv with what is to come behind it."""

    def __init__(self, behind: Callable[[Odd, Tensor, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.behind = behind
        given: dict[str, Any] = {"kernel_size": 3, "groups": 4}
        self.conv = nn.Conv2d(4, 4, **(given | options))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        return self.behind(self, x, self.conv(x))


def plainly(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    return module.norm(y)


def between(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    x.mul_(2.0)
    return module.norm(y) + x.sum()


STAYS: dict[str, tuple[Odd, str]] = {
    "two users": (Odd(lambda m, x, y: m.norm(y) + y.mean()), "its output has 2 users"),
    "no norm": (Odd(lambda m, x, y: m.norm(y.relu())), "aten.relu.default follows, not a batch norm"),
    "large": (Odd(plainly, kernel_size=(9, 1)), "its kernel of 9x1 is larger than 7x7"),
    "lopsided": (Odd(plainly, kernel_size=(3, 4), padding="same"), "its padding differs from one side to the other"),
    "strided": (
        Odd(plainly, stride=2),
        "by its stride it reads so much more than it writes that one op would read more",
    ),
    "changed": (Odd(between), "node 'mul_' in between changes what they are given or how they run"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", STAYS)
def test_what_stays_two_ops(name: str) -> None:
    model, reason = STAYS[name]
    graph = gpd_fx.capture(model.double(), (torch.randn(2, 4, 11, 11, dtype=torch.float64),), mode="train")
    result = FuseDepthwise()(graph)
    assert not result.modified
    assert result.notes == (f"conv2d: {reason}",)
    assert str(result.graph_module.graph) == str(graph.graph)


@pytest.mark.parametrize("options", [{"groups": 2}, {"groups": 1}])
def test_other_convs_are_not_looked_at(options: dict[str, Any]) -> None:
    graph = gpd_fx.capture(Odd(plainly, **options), (torch.randn(2, 4, 6, 6),))
    (note,) = FuseDepthwise()(graph).notes
    assert note.startswith("no depthwise conv2d takes its kernel from an attribute; saw ")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_pass_alone(mode: Any) -> None:
    model = Odd(plainly, kernel_size=(3, 5), padding="same", dilation=2).double()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    graph = gpd_fx.capture(model, (x,), mode=mode)
    before = str(graph.graph)
    result = FuseDepthwise()(graph)
    assert result.modified
    assert result.notes == ("conv2d: one op with its batch norm",)
    assert str(graph.graph) == before
    again = FuseDepthwise()(result.graph_module)
    assert not again.modified
    named = {name: buffer.clone() for name, buffer in graph.named_buffers()}
    expected = graph(x)
    graph.load_state_dict(named, strict=False)
    assert torch.equal(result.graph_module(x), expected)


def test_a_synchronised_norm_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.SyncBatchNorm(4), nn.Conv2d(4, 2, 1))
    teacher = gpd_fx.expand(model, 2.0, (torch.randn(2, 3, 5, 5),), verify=False)
    assert {(row.parameter, row.runs, row.reason) for row in teacher.fuse().rows} == {
        ("1.weight", "apart", "its batch norm is synchronised")
    }
    assert not any("depthwise_norm" in code for code in codes(teacher))
