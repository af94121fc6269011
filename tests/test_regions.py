"""Regions without gradients and under autocast: followed like anything else, and still what they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gpd_fx
from bench.zoo.check import randomise
from gpd_fx.errors import InputError


class Normed(nn.Module):
    """A layer divided by an estimate of its spectral norm, which is made without gradients and kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 7, bias=False), nn.Linear(7, 3)
        self.register_buffer("u", torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        weight, u = self.second.weight, self.get_buffer("u")
        with torch.no_grad():
            right = nn.functional.normalize(weight.mT @ u, dim=0)
            left = nn.functional.normalize(weight @ right, dim=0)
            if self.training:
                u.copy_(left)
        return self.last((self.first(x) @ weight.mT / torch.dot(left, weight @ right)).relu())


class Careful(nn.Module):
    """A region kept out of autocast, and one under it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            x = self.second(x.float()).softmax(-1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.last(x)
        return x.float()


class Nested(nn.Module):
    """Gradients switched on within a region without them stay the region's own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.first(x)
            with torch.enable_grad():
                y = y * 2
            y = y.relu()
        with torch.enable_grad():
            return self.last(self.first(x) + y)


@pytest.mark.parametrize("ratio", [2.0, 1.5])
def test_a_norm_without_gradients_widens_and_updates_its_buffer(ratio: float) -> None:
    model = randomise(Normed().double(), 0)
    x = torch.randn(4, 5, dtype=torch.float64)
    teacher = gpd_fx.expand(model, ratio, (x,)).train()
    assert teacher.report().coverage > 0.95
    assert not [entry for entry in teacher.report().frozen if "no rule" in entry.reason]
    model.train()
    for _ in range(3):  # the buffer moves at each call
        torch.testing.assert_close(teacher(x), model(x), rtol=1e-12, atol=1e-12)
    mine = dict(teacher.wide_buffers.named_buffers())["u"]
    torch.testing.assert_close(mine[:7], model.get_buffer("u"), rtol=1e-12, atol=1e-12)


def test_no_gradient_flows_through_a_region_without_gradients() -> None:
    model = randomise(Normed().double(), 1).train()
    x = torch.randn(4, 5, dtype=torch.float64)
    teacher = gpd_fx.expand(model, 1.0, (x,), branches=None).train()
    model(x).square().sum().backward()
    teacher(x).square().sum().backward()
    found = dict(teacher.composition.weights.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_within_a_region_without_them(mode: str) -> None:
    model = randomise(Nested().double(), 2).train(mode == "train")
    x = torch.randn(4, 5, dtype=torch.float64)
    teacher = gpd_fx.expand(model, 2.0, (x,))
    torch.testing.assert_close(teacher(x), model(x), rtol=1e-12, atol=1e-12)


def test_regions_under_autocast_widen_and_keep_their_precision() -> None:
    model = randomise(Careful(), 3).eval()
    x = torch.randn(4, 5)
    teacher = gpd_fx.expand(model, 2.0, (x,))
    assert teacher.report().coverage > 0.95
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide, plain = teacher(x), model(x)
    torch.testing.assert_close(wide, plain, rtol=0.05, atol=0.05)
    dtypes: list[torch.dtype] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n.target is torch.ops.aten.linear.default and isinstance(result, Tensor):
                dtypes.append(result.dtype)
            return result

    graph = teacher.as_graph()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        Watch(graph).run(x)
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]  # the caller's autocast, none, the region's own
    assert torch.is_autocast_enabled("cpu") is False


def test_an_error_within_a_region_leaves_autocast_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Careful(), 4).eval()
    x = torch.randn(4, 5)
    teacher = gpd_fx.expand(model, 2.0, (x,))
    graph = teacher.get_submodule("graphs.eval_mode")
    assert isinstance(graph, torch.fx.GraphModule)
    softmax = next(node for node in graph.graph.nodes if "softmax" in str(node.target))

    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("out of memory")

    softmax.target = fail
    graph.recompile()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="out of memory"):
            teacher(x)
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(InputError):
        teacher(torch.randn(4, 6))


def test_a_moved_teacher_enters_autocast_for_its_new_device() -> None:
    model = Careful().eval()
    teacher = gpd_fx.expand(model, 2.0, (torch.randn(4, 5),)).to("meta")
    graph = teacher.get_submodule("graphs.eval_mode")
    assert isinstance(graph, torch.fx.GraphModule)
    entered = [node for node in graph.graph.nodes if "enter_autocast" in str(node.target)]
    assert [node.args[0] for node in entered] == ["meta", "meta"]
