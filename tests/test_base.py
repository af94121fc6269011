"""What every pass promises: conditions checked around `run`, and errors that name the pass and those before it."""

from __future__ import annotations

import copy
import operator
import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra import pass_base
from torch.fx.passes.infra.pass_manager import PassManager

from gpd_fx.errors import ArgumentError, GPDError, PassError
from gpd_fx.passes import Pass, PassResult, Pipeline


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
        result = Replace().run(module).graph_module
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
    assert result.modified
    assert result.notes == ("replaced 2",)
    assert str(module.graph) == before
    assert torch.equal(module(x), torch.tensor([0.0, 4.0]))
    assert torch.equal(result.graph_module(x), -2 * x)


def test_a_pass_that_finds_nothing_says_so() -> None:
    assert not Replace(old=torch.sigmoid)(traced()).modified


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
    assert result.modified
    assert result.notes == ("replaced 2", "replaced 2", "replaced 0")
    assert torch.equal(result.graph_module(torch.tensor([-3.0])), torch.tensor([6.0]))


def test_an_empty_pipeline_is_the_identity() -> None:
    module = traced()
    result = Pipeline(())(module)
    assert result.graph_module is module
    assert not result.modified


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


# ------------------------------------------------------------------------------------------ laws of the base class


@dataclass(frozen=True)
class WriteWeights(Pass):
    """Shares parameters, and writes to one of them, or to the graph of its argument, or to a record of a node."""

    where: str

    def run(self, module: fx.GraphModule) -> PassResult:
        if self.where == "weight":
            with torch.no_grad():
                module.get_parameter("layer.weight").mul_(2)
        elif self.where == "another weight":
            module.get_submodule("layer").register_parameter("weight", nn.Parameter(torch.zeros(2, 3)))
        elif self.where == "target":
            next(n for n in module.graph.nodes if n.target is torch.relu).target = torch.neg
        elif self.where == "number":
            module.graph.erase_node(next(n for n in module.graph.nodes if n.target is torch.abs))
        else:
            next(iter(module.graph.nodes)).meta["note"] = 1
        return PassResult(module, True)


def with_weights() -> fx.GraphModule:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            torch.abs(x)
            return torch.relu(self.layer(x))

    return fx.symbolic_trace(Net())


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("weight", r"'layer\.weight' was written to"),
        ("another weight", r"'layer\.weight' is another tensor"),
        ("target", r"node 'relu' is not as it was"),
        ("number", r"node 'abs_1' is not as it was"),
        ("meta", r"node 'x' is not as it was"),
    ],
)
def test_a_pass_that_changes_its_argument_is_refused(where: str, message: str) -> None:
    with pytest.raises(PassError, match=rf"^WriteWeights changed its argument: {message}; a pass has to work on a"):
        WriteWeights(where)(with_weights())


def test_parameters_are_shared_or_new_as_declared() -> None:
    class Copied(Pass):
        def run(self, module: fx.GraphModule) -> PassResult:
            return PassResult(copy.deepcopy(module), True)

    class CopiedAsDeclared(Copied):
        parameters = "new"

    class Viewed(Pass):
        parameters = "new"

        def run(self, module: fx.GraphModule) -> PassResult:
            twin = copy.deepcopy(module)
            weight = module.get_parameter("layer.weight").detach()
            twin.get_submodule("layer").register_parameter("weight", nn.Parameter(weight))
            return PassResult(twin, True)

    with pytest.raises(PassError, match=r"^Copied: its parameter 'layer\.weight' is none of its argument's, but the"):
        Copied()(with_weights())
    with pytest.raises(PassError, match=r"^Viewed: its parameter 'layer\.weight' is its argument's, but the pass"):
        Viewed()(with_weights())
    module = with_weights()
    assert CopiedAsDeclared()(module).graph_module.get_parameter("layer.weight") is not module.get_parameter(
        "layer.weight"
    )


def test_a_result_of_another_type_is_refused() -> None:
    class Plain(Pass):
        def run(self, module: fx.GraphModule) -> PassResult:
            return module  # pyright: ignore[reportReturnType]  that is the test

    with pytest.raises(PassError, match=r"^Plain: run returned a Double; return a PassResult"):
        Plain()(traced())


def test_a_result_is_torchs() -> None:
    result = PassResult(traced(), True, ("a note",))
    assert isinstance(result, pass_base.PassResult)
    module, modified = result
    assert module is result.graph_module
    assert modified
    assert result.notes == ("a note",)
    assert PassResult(module, False).notes == ()
    assert pickle.loads(pickle.dumps(PassResult(fx.symbolic_trace(nn.ReLU()), True, ("kept",)))).notes == ("kept",)


# ---------------------------------------------------------------------------------------------- torch's own passes


class Negate(pass_base.PassBase):
    """One of torch's passes, which changes what it is given."""

    def call(self, graph_module: fx.GraphModule) -> pass_base.PassResult:
        hits = [node for node in graph_module.graph.nodes if node.target is torch.relu]
        for node in hits:
            node.target = torch.neg
        return pass_base.PassResult(graph_module, bool(hits))


def test_torchs_manager_runs_our_passes() -> None:
    manager = PassManager([Replace(), Negate(), Replace(torch.neg, torch.abs)], run_checks_after_each_pass=True)
    module = traced()
    result = manager(module)
    assert result.modified
    assert torch.equal(result.graph_module(torch.tensor([-3.0])), torch.tensor([6.0]))
    assert torch.equal(module(torch.tensor([-3.0])), torch.tensor([0.0]))
    assert not PassManager([Replace(old=torch.sigmoid)], steps=3)(module).modified
    with pytest.raises(Exception, match="occurred when running the 'Refuse' pass after the following passes") as info:
        PassManager([Replace(), Refuse()])(module)
    assert isinstance(info.value.__cause__, PassError)


def test_a_pipeline_runs_torchs_passes_and_functions() -> None:
    def in_place(module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            if node.target is torch.neg:
                node.target = torch.abs

    def returned(module: fx.GraphModule) -> fx.GraphModule:
        return Replace(torch.abs, torch.square).run(module).graph_module

    module = traced()
    before = str(module.graph)
    seen: list[tuple[str, bool]] = []
    manager = PassManager([Negate()])
    steps = (Negate(), Replace(torch.sin), in_place, returned, manager)
    result = Pipeline(steps, after=lambda name, found: seen.append((name, found.modified)))(module)
    assert torch.equal(result.graph_module(torch.tensor([-3.0])), torch.tensor([18.0]))
    assert str(module.graph) == before
    assert seen == [
        ("Negate", True),
        ("Replace", False),
        ("in_place", True),
        ("returned", True),
        ("PassManager", False),
    ]
    assert result.notes == ("replaced 0",)


def test_what_a_foreign_pass_raises_names_it() -> None:
    def clumsy(module: fx.GraphModule) -> None:
        raise KeyError("relu")

    def wrong(module: fx.GraphModule) -> Any:
        return module.graph

    with pytest.raises(PassError, match=r"^pass clumsy \(after Negate\): it raised KeyError: 'relu'$") as info:
        Pipeline((Negate(), clumsy))(traced())
    assert isinstance(info.value.__cause__, PassError)
    assert isinstance(info.value.__cause__.__cause__, KeyError)
    with pytest.raises(PassError, match=r"^pass wrong: it returned a Graph; return a GraphModule"):
        Pipeline((wrong,))(traced())


@pytest.mark.parametrize(
    ("step", "what"), [(Negate, "the class Negate"), (3, "int"), (nn.Linear(1, 1), None), (None, "NoneType")]
)
def test_a_pipeline_holds_only_what_can_run(step: Any, what: str | None) -> None:
    if what is None:  # a module can be called, but gives no graph
        with pytest.raises(PassError, match=r"^pass Linear: it raised"):
            Pipeline((step,))(traced())
        return
    with pytest.raises(PassError, match=f"^Pipeline: passes holds {what}; give instances of passes, or functions"):
        Pipeline((step,))


# ------------------------------------------------------------------------------------------------ values compared


def test_the_pass_that_changed_the_values_is_named() -> None:
    x = torch.randn(4)
    same = Replace(torch.relu, torch.nn.functional.relu)
    assert Pipeline((same,), verify=(x,))(traced()).modified
    with pytest.raises(PassError, match=r"^pass Replace \(after Replace\): it changed the values by .* in float64"):
        Pipeline((same, Replace(torch.nn.functional.relu)), verify=(x,))(traced())
    with pytest.raises(PassError, match=r"^pass Negate: it changed the values by"):
        Pipeline((Negate(),), verify={"x": x})(traced())


def test_a_pass_may_declare_that_it_changes_the_function() -> None:
    class Declared(Replace):
        changes_function = True

    def function(module: fx.GraphModule) -> None:
        Negate().call(module)

    x = torch.randn(4)
    assert Pipeline((Declared(),), verify=(x,))(traced()).modified
    function.changes_function = True  # pyright: ignore[reportFunctionMemberAccess]  as a user would
    assert Pipeline((function,), verify=(x,))(traced()).modified
    with pytest.raises(PassError, match=r"^pass Replace \(after function\): it changed the values"):
        Pipeline((function, Replace(torch.neg, torch.abs)), verify=(x,))(traced())


def test_values_are_compared_in_float64_whatever_the_graph_has() -> None:
    @dataclass(frozen=True)
    class Perturb(Pass):
        by: float
        parameters = "new"

        def run(self, module: fx.GraphModule) -> PassResult:
            twin = copy.deepcopy(module)
            with torch.no_grad():
                twin.get_parameter("layer.weight").mul_(1 + self.by)
            return PassResult(twin, True)

    module = with_weights()
    x = torch.randn(5, 3)
    assert Pipeline((Perturb(0.0),), verify=(x,))(module).modified
    with pytest.raises(PassError, match=r"it changed the values by \d\.\de-0[56] of the largest"):
        Pipeline((Perturb(1e-5),), verify=(x,))(module)
    assert module.get_parameter("layer.weight").dtype == torch.float32


def test_inputs_that_do_not_fit_are_told() -> None:
    for wrong, what in ((torch.ones(3), "Tensor"), (3, "int")):
        with pytest.raises(PassError, match=rf"^verify is a {what}; pass a tuple of positional inputs"):
            Pipeline((Replace(),), verify=wrong)(traced())  # pyright: ignore[reportArgumentType]  that is the test
    with pytest.raises(PassError, match=r"^pass Replace: verify: the graph before it does not run on these inputs"):
        Pipeline((Replace(),), verify=(torch.ones(3), torch.ones(3)))(traced())
