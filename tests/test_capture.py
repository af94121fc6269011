"""Capture: a graph of ATen ops that is the model, over the model's own parameters."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gpd_fx
from gpd_fx.errors import CaptureError, InputError
from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.fxtools.torch_internals import OpOverload

Randomise = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.act(self.norm(self.conv(x))).mean((2, 3))))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


@pytest.fixture
def model(randomise: Randomise) -> nn.Module:
    return randomise(Net())


def targets(graph: fx.GraphModule) -> list[str]:
    return [op_name(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_the_graph_is_the_model(model: nn.Module) -> None:
    graph = gpd_fx.capture(model, (images(),))
    model.eval()
    for batch in (2, 1, 7):
        x = images(batch)
        assert torch.equal(graph(x), model(x))


def test_the_graph_holds_aten_ops_only(model: nn.Module) -> None:
    for mode in ("train", "eval"):
        graph = gpd_fx.capture(model, (images(),), mode=mode)
        for node in graph.graph.nodes:
            assert node.op in ("placeholder", "get_attr", "call_function", "output")
            if node.op == "call_function":
                assert isinstance(node.target, OpOverload) or node.target is operator.getitem
                assert "val" in node.meta
        assert not any("assert" in target or "guard" in target for target in targets(graph))
        assert type(graph) is not torch.export.ExportedProgram
        graph.train()  # the exporter's own module refuses


def test_parameters_are_the_models_own_and_buffers_copies(model: nn.Module) -> None:
    graph = gpd_fx.capture(model, (images(),), mode="train")
    assert dict(graph.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for name, parameter in graph.named_parameters():
        assert parameter is model.get_parameter(name)
    before = copy.deepcopy(model.state_dict())
    graph(images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(graph.get_buffer("norm.running_mean"), model.get_buffer("norm.running_mean"))
    graph(images()).sum().backward()
    assert model.get_parameter("conv.weight").grad is not None


def test_the_mode_is_baked_in(model: nn.Module) -> None:
    model.train()
    evaluated, trained = (gpd_fx.capture(model, (images(),), mode=mode) for mode in ("eval", "train"))
    assert model.training
    x = images()
    assert torch.equal(evaluated(x), evaluated.train()(x))
    assert not torch.equal(trained(x), trained.eval()(x))  # dropout draws anew
    (norm,) = (node for node in trained.graph.nodes if "batch_norm" in str(node.target))
    assert norm.args[5] is True


def test_in_place_ops_stay(model: nn.Module) -> None:
    assert "aten.relu_.default" in targets(gpd_fx.capture(model, (images(),)))


def test_an_example_batch_of_one(model: nn.Module) -> None:
    graph = gpd_fx.capture(model, (images(1),))
    x = images(5)
    assert torch.equal(graph(x), model.eval()(x))


def test_keywords_free_keywords_and_free_positions() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, *xs: Tensor, gain: float = 1.0, **more: Tensor) -> Tensor:
            return torch.stack([self.layer(x) for x in xs]).sum(0) * gain + more["bias"] * more["shift"]

    model = Free()
    x, y, z = torch.randn(3, 2, 3).unbind(0)
    graph = gpd_fx.capture(model, (x, y), {"gain": 2.0, "bias": torch.ones(2, 4), "shift": torch.ones(2, 1)})
    kwargs: dict[str, Any] = {"gain": 2.0, "bias": torch.randn(2, 4), "shift": torch.randn(2, 1)}
    assert torch.equal(graph(y, z, **kwargs), model(y, z, **kwargs))
    assert "forward" not in vars(model)


@dataclass
class Output:
    logits: Tensor
    rest: list[Tensor]


def test_dataclass_outputs() -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Output:
            h = self.layer(x)
            return Output(h, [h + 1])

    model = Structured()
    x = torch.randn(2, 3)
    out = gpd_fx.capture(model, (x,))(x)
    assert isinstance(out, Output)
    assert torch.equal(out.rest[0], model(x).rest[0])


def test_regions_under_autocast_are_inlined_without_assertions() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                h = F.relu(self.first(x.float()))
            return self.second(h)

    graph = gpd_fx.capture(Careful(), (torch.randn(2, 3),))
    assert [module for module in graph.modules() if isinstance(module, fx.GraphModule)] == [graph]
    called = targets(graph)
    assert not any("assert" in target for target in called)
    inside = called[called.index("_enter_autocast") + 1 : called.index("_exit_autocast")]
    assert [target for target in inside if "linear" in target or "relu" in target] == [
        "aten.linear.default",
        "aten.relu.default",
    ]


def test_tied_and_repeated_modules_keep_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.second(self.first(x)))

    model = Tied()
    graph = gpd_fx.capture(model, (torch.randn(2, 4),))
    assert {id(p) for p in graph.parameters()} == {id(p) for p in model.parameters()}
    x = torch.randn(3, 4)
    assert torch.equal(graph(x), model(x))


def test_the_model_keeps_its_mode_and_hooks(model: nn.Module) -> None:
    model.train()
    model.get_submodule("norm").eval()
    modes = [module.training for module in model.modules()]
    handle = model.register_forward_hook(lambda *_: None)
    gpd_fx.capture(model, (images(),))
    assert [module.training for module in model.modules()] == modes
    handle.remove()


def test_errors(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"Net cannot be called with the example inputs \[float32\[2, 4\] on cpu\]"):
        gpd_fx.capture(model, (torch.randn(2, 4),))
    with pytest.raises(InputError, match="example_inputs is a tensor"):
        gpd_fx.capture(model, images())  # pyright: ignore[reportArgumentType]  that is the test

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        CaptureError, match=r"cannot capture Branches in train mode at File .*test_capture.*, in forward"
    ):
        gpd_fx.capture(Branches(), (torch.randn(2, 3),), mode="train")


def test_what_a_model_keeps_of_a_call_is_not_a_fake() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.seen: list[Tensor] = []
            self.last: Tensor | None = None
            self.calls = 7

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).relu()
            self.last, self.fresh = h, x
            self.seen.append(h)
            self.calls += 1
            return self.second(h)

    model = Keeping().double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    gpd_fx.capture(model, (x,))
    teacher = gpd_fx.expand(model, 2.0)  # its inputs are guessed by calls
    for kept in (model, teacher.skeleton):
        state = vars(kept)
        assert (state["seen"], state["last"], state["calls"], "fresh" in state) == ([], None, 7, False)
    expected = model(x)
    torch.testing.assert_close(teacher.student(x), expected)
    torch.testing.assert_close(teacher(x), expected)
