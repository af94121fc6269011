"""What every pass promises: conditions checked around `run`, and errors that name the pass and those before it."""

from __future__ import annotations

import operator
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import Tensor, fx, nn

from gpd_fx.errors import ArgumentError, GPDError, PassError
from gpd_fx.passes.base import Pass, PassResult, Pipeline


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + torch.relu(x)


@dataclass(frozen=True)
class Replace(Pass):
    """Replaces one function by another in a copy of the graph."""

    old: object = torch.relu
    new: object = torch.neg

    def run(self, module: fx.GraphModule) -> PassResult:
        result = fx.GraphModule(module, module.graph.__class__())
        result.graph.output(result.graph.graph_copy(module.graph, {}))
        hits = [node for node in result.graph.nodes if node.target is self.old]
        for node in hits:
            node.target = self.new
        result.recompile()
        return PassResult(result, bool(hits), (f"replaced {len(hits)}",))


@dataclass(frozen=True)
class Refuse(Pass):
    """Refuses every module; with the class of error it is given."""

    error: type[GPDError] = PassError

    def requires(self, module: fx.GraphModule) -> None:
        raise self.error("node relu: not today")

    def run(self, module: fx.GraphModule) -> PassResult:
        raise AssertionError("run after a failed precondition")


@dataclass(frozen=True)
class Break(Pass):
    """Returns a graph in which a node is used before it is defined."""

    def run(self, module: fx.GraphModule) -> PassResult:
        result = Replace().run(module).module
        first, second = (node for node in result.graph.nodes if node.op == "call_function" and node.target is torch.neg)
        second.append(first)
        (add,) = (node for node in result.graph.nodes if node.target is operator.add)
        first.args = (add,)
        return PassResult(result, True)


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Double())


def test_a_pass_leaves_its_argument_and_says_that_it_changed_something() -> None:
    module = traced()
    before = str(module.graph)
    result = Replace()(module)
    x = torch.tensor([-1.0, 2.0])
    assert result.changed
    assert result.notes == ("replaced 2",)
    assert str(module.graph) == before
    assert torch.equal(module(x), torch.tensor([0.0, 4.0]))
    assert torch.equal(result.module(x), -2 * x)


def test_a_pass_that_finds_nothing_says_so() -> None:
    assert not Replace(old=torch.sigmoid)(traced()).changed


def test_options_are_fields_and_cannot_change() -> None:
    step = Replace(new=torch.abs)
    assert step == Replace(new=torch.abs)
    with pytest.raises(FrozenInstanceError):
        step.new = torch.neg  # pyright: ignore[reportAttributeAccessIssue]  that is the test


@pytest.mark.parametrize("given", [nn.Linear(2, 2), None, "model"])
def test_only_graph_modules_are_taken(given: object) -> None:
    with pytest.raises(PassError, match=rf"Replace takes an fx\.GraphModule, got {type(given).__name__}"):
        Replace()(given)  # pyright: ignore[reportArgumentType]  that is the test


def test_the_precondition_is_checked_first() -> None:
    with pytest.raises(PassError, match="not today"):
        Refuse()(traced())


def test_the_postcondition_catches_a_broken_graph() -> None:
    with pytest.raises(RuntimeError, match="before it has been defined"):
        Break()(traced())


def test_a_pipeline_runs_in_order_and_gathers_what_was_said() -> None:
    result = Pipeline((Replace(), Replace(torch.neg, torch.abs), Replace(torch.sin)))(traced())
    assert result.changed
    assert result.notes == ("replaced 2", "replaced 2", "replaced 0")
    assert torch.equal(result.module(torch.tensor([-3.0])), torch.tensor([6.0]))


def test_an_empty_pipeline_is_the_identity() -> None:
    module = traced()
    result = Pipeline(())(module)
    assert result.module is module
    assert not result.changed


@pytest.mark.parametrize("error", [PassError, ArgumentError])
def test_an_error_keeps_its_class_and_names_the_pass_and_those_before(error: type[GPDError]) -> None:
    with pytest.raises(error, match=r"^pass Refuse \(after Replace, Replace\): node relu: not today$"):
        Pipeline((Replace(), Replace(torch.neg), Refuse(error)))(traced())


def test_an_error_in_the_first_pass_names_none_before() -> None:
    with pytest.raises(PassError, match=r"^pass Refuse: node relu"):
        Pipeline((Refuse(),))(traced())


def test_a_pipeline_inside_a_pipeline_names_both() -> None:
    with pytest.raises(PassError, match=r"^pass Pipeline \(after Replace\): pass Refuse: node relu"):
        Pipeline((Replace(), Pipeline((Refuse(),))))(traced())
