"""The passes alone and in a pipeline, on captured graphs: laws first, then what changes in the text of a graph."""

from __future__ import annotations

import copy
import difflib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gpd_fx
from gpd_fx.composition.composition import Composition
from gpd_fx.errors import ArgumentError, PassError
from gpd_fx.passes import (
    Branch,
    Fold,
    Merge,
    Pass,
    PassResult,
    Pipeline,
    Propagate,
    Widen,
)
from gpd_fx.passes.propagate import AXES
from gpd_fx.verify.verification import relative_error

Randomise = Callable[[nn.Module], nn.Module]
D = torch.float64
RATIOS = [2.0, 1.5, 3.0, {"*": 2.0}]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.b = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))).mean((2, 3)))


class Shuffle(nn.Module):
    """A grouped conv and a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.h = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.g(self.a(x))
        n, c, h, w = y.shape
        return self.h(y.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, c, h, w))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.qkv, self.o = nn.Linear(3, 4), nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, t, c) + x)


class Reductions(nn.Module):
    """Reductions over channels, and a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        return self.b(h.softmax(-1) * h.sum(-1, keepdim=True)), h @ h.t()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.again = self.b

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.again(F.relu(self.b(self.a(x)))))


MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "conv": (ConvNet, (2, 3, 5, 5)),
    "shuffle": (Shuffle, (2, 3, 5, 5)),
    "attention": (Attention, (2, 5, 3)),
    "reductions": (Reductions, (2, 3)),
    "tied": (Tied, (2, 3)),
}


@pytest.fixture(params=MODELS)
def captured(request: pytest.FixtureRequest, randomise: Randomise) -> tuple[fx.GraphModule, Tensor]:
    """A captured model with random values, and an input of another batch."""
    return capture(request.param, randomise)


def capture(name: str, randomise: Randomise) -> tuple[fx.GraphModule, Tensor]:
    make, shape = MODELS[name]
    model = randomise(make()).double().eval()
    graph = gpd_fx.capture(model, (torch.randn(shape, dtype=D),))
    return graph, torch.randn(5, *shape[1:], dtype=D)


def lines(module: fx.GraphModule) -> list[str]:
    """One line a node that computes something."""
    found: list[str] = []
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_module", "output"):
            target = re.sub(r"^aten\.|\.\w+$", "", str(node.target)) if node.op == "call_function" else node.target
            if node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage]  no public name
                target = getattr(node.target, "__name__", str(node.target))
            found.append(f"{node.name} = {target}({', '.join(map(str, node.args))})")
    return found


def difference(before: fx.GraphModule, after: fx.GraphModule) -> list[str]:
    """The lines that went and came."""
    changes = difflib.unified_diff(lines(before), lines(after), n=0, lineterm="")
    return [line for line in changes if not line.startswith(("---", "+++", "@@"))]


def inserted(before: fx.GraphModule, after: fx.GraphModule) -> dict[str, int]:
    """How many more nodes of each kind there are."""
    counts = [Counter(str(node.target) for node in m.graph.nodes if node.op != "get_attr") for m in (before, after)]
    assert not counts[0] - counts[1]
    return dict(counts[1] - counts[0])


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# ------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("ratio", RATIOS)
def test_widening_is_exact(captured: tuple[fx.GraphModule, Tensor], ratio: Any) -> None:
    graph, x = captured
    result = Widen(ratio)(graph)
    assert result.modified
    assert relative_error(graph(x), result.graph_module(x)) <= 1e-12
    assert sum(p.numel() for p in result.graph_module.parameters()) > sum(p.numel() for p in graph.parameters())


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_whole_pipeline_is_the_identity(captured: tuple[fx.GraphModule, Tensor], ratio: Any) -> None:
    graph, x = captured
    result = Pipeline((Widen(ratio), Branch(), Merge(), Fold()))(graph)
    folded = result.graph_module
    assert result.modified
    assert folded.code == graph.code
    assert list(folded.state_dict()) == list(graph.state_dict())
    for name, tensor in graph.state_dict().items():
        assert relative_error(tensor, folded.state_dict()[name]) <= 1e-12, name
    assert relative_error(graph(x), folded(x)) <= 1e-12


def test_folding_after_widening_is_the_identity(captured: tuple[fx.GraphModule, Tensor]) -> None:
    graph, x = captured
    folded = Pipeline((Widen(1.5), Fold()))(graph).graph_module
    assert folded.code == graph.code
    assert relative_error(graph(x), folded(x)) <= 1e-12


def test_branches_and_merging_change_nothing(captured: tuple[fx.GraphModule, Tensor]) -> None:
    graph, x = captured
    expected = graph(x)
    branched = Branch(seed=3)(graph)
    assert branched.modified
    assert relative_error(expected, branched.graph_module(x)) <= 1e-12
    with torch.no_grad():  # as training would
        for parameter in branched.graph_module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    trained = branched.graph_module(x)
    merged = Merge()(branched.graph_module)
    assert relative_error(expected, trained) > 1e-3
    assert relative_error(trained, merged.graph_module(x)) <= 1e-12
    assert lines(merged.graph_module) == lines(graph)


def test_no_pass_changes_what_it_is_given(captured: tuple[fx.GraphModule, Tensor]) -> None:
    graph, _ = captured
    passes: list[Pass] = [Propagate(), Widen(), Branch(), Merge(), Fold()]
    module = graph
    for step in passes:
        code, values = module.code, state(module)
        after = step(module).graph_module
        assert module.code == code
        assert all(torch.equal(tensor, values[name]) for name, tensor in module.state_dict().items())
        module = after


def test_propagation_says_what_is_the_same_axis(captured: tuple[fx.GraphModule, Tensor]) -> None:
    graph, x = captured
    result = Propagate()(graph)
    assert not result.modified
    assert result.graph_module.code == graph.code
    assert torch.equal(torch.as_tensor(relative_error(graph(x), result.graph_module(x))), torch.tensor(0.0))
    for node in result.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            assert len(node.meta[AXES]) == value.dim()


def test_the_same_seed_gives_the_same_graph(captured: tuple[fx.GraphModule, Tensor]) -> None:
    graph, _ = captured
    first, second, third = (state(Widen(2.0, seed=seed)(graph).graph_module) for seed in (1, 1, 2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, third[name]) for name, tensor in first.items())


def test_equal_shares(randomise: Randomise) -> None:
    graph, x = capture("conv", randomise)
    wide = Widen(2.0, equal_alpha=True)(graph).graph_module
    weight = wide.get_parameter("b.weight")
    assert torch.equal(weight[:, :4], weight[:, 4:])
    assert relative_error(graph(x), wide(x)) <= 1e-12
    uneven = Widen(2.0)(graph).graph_module.get_parameter("b.weight")
    assert not torch.equal(uneven[:, :4], uneven[:, 4:])


def test_wide_parameters_train_and_fold(randomise: Randomise) -> None:
    graph, x = capture("conv", randomise)
    wide = Pipeline((Widen(2.0), Branch()))(graph).graph_module
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    wide(x).square().mean().backward()
    optimizer.step()
    merged = Merge()(wide).graph_module
    assert relative_error(wide(x), merged(x)) <= 1e-12
    folded = Fold()(merged).graph_module
    assert {n: p.shape for n, p in folded.named_parameters()} == {n: p.shape for n, p in graph.named_parameters()}
    assert relative_error(graph(x), folded(x)) > 1e-6


def test_frozen_parameters_stay_frozen(randomise: Randomise) -> None:
    make, shape = MODELS["conv"]
    model = randomise(make()).double().eval()
    model.get_parameter("a.weight").requires_grad_(False)
    graph = gpd_fx.capture(model, (torch.randn(shape, dtype=D),))
    for module in (Widen()(graph).graph_module, Pipeline((Widen(), Branch(), Merge(), Fold()))(graph).graph_module):
        assert not module.get_parameter("a.weight").requires_grad
        assert module.get_parameter("b.weight").requires_grad


def test_train_mode(randomise: Randomise) -> None:
    make, shape = MODELS["conv"]
    model = randomise(make()).double().train()
    graph = gpd_fx.capture(model, (torch.randn(shape, dtype=D),), mode="train")
    wide = Widen(2.0)(graph).graph_module
    x = torch.randn(6, *shape[1:], dtype=D)
    assert relative_error(copy.deepcopy(graph)(x), wide(x)) <= 1e-12
    graph(x)
    for name in ("n.running_mean", "n.running_var"):
        assert relative_error(graph.get_buffer(name).repeat(2), wide.get_buffer(name)) <= 1e-12


# ----------------------------------------------------------------------------------------------- before and after


def test_a_conv_net_keeps_its_text(randomise: Randomise) -> None:
    graph, _ = capture("conv", randomise)
    wide = Widen(2.0)(graph).graph_module
    assert difference(graph, wide) == []
    assert {name: tuple(t.shape) for name, t in wide.state_dict().items()} == {
        "a.weight": (8, 3, 3, 3),
        "n.weight": (8,),
        "n.bias": (8,),
        "n.running_mean": (8,),
        "n.running_var": (8,),
        "b.weight": (2, 8),
        "b.bias": (2,),
    }


def test_groups_and_sizes_follow(randomise: Randomise) -> None:
    graph, _ = capture("shuffle", randomise)
    wide = Widen(2.0)(graph).graph_module
    assert difference(graph, wide) == [
        "-conv2d_1 = conv2d(conv2d, g_weight, g_bias, [1, 1], [0, 0], [1, 1], 2)",
        "-view = view(conv2d_1, [sym_size_int_1, 2, 4, 3, 3])",
        "+conv2d_1 = conv2d(conv2d, g_weight, g_bias, [1, 1], [0, 0], [1, 1], 4)",
        "+view = view(conv2d_1, [sym_size_int_1, 4, 4, 3, 3])",
        "-reshape = reshape(transpose, [sym_size_int_1, 8, 3, 3])",
        "+reshape = reshape(transpose, [sym_size_int_1, 16, 3, 3])",
    ]
    assert inserted(graph, wide) == {}
    assert tuple(wide.get_parameter("g.weight").shape) == (16, 2, 3, 3)  # twice the groups, each as wide as before


def test_heads_widen_and_not_their_width(randomise: Randomise) -> None:
    graph, _ = capture("attention", randomise)
    wide = Widen(2.0)(graph).graph_module
    assert difference(graph, wide) == [
        "-view = view(linear_1, [sym_size_int_1, 5, 3, 2, 2])",
        "+view = view(linear_1, [sym_size_int_1, 5, 3, 4, 2])",
        "-reshape = reshape(transpose_1, [sym_size_int_1, 5, 4])",
        "+reshape = reshape(transpose_1, [sym_size_int_1, 5, 8])",
    ]
    assert inserted(graph, wide) == {}
    assert tuple(wide.get_parameter("qkv.weight").shape) == (24, 8)


def test_reductions_get_their_constants(randomise: Randomise) -> None:
    graph, _ = capture("reductions", randomise)
    wide = Widen(2.0)(graph).graph_module
    assert difference(graph, wide) == [
        "+mul_tensor = mul(softmax, 2.0)",
        "-mul = mul(softmax, sum_1)",
        "+mul_tensor_1 = mul(sum_1, 0.5)",
        "+mul = mul(mul_tensor, mul_tensor_1)",
        "-matmul = matmul(linear, t)",
        "+mul_tensor_2 = mul(t, _gpd_alpha_0)",
        "+matmul = matmul(linear, mul_tensor_2)",
    ]
    assert inserted(graph, wide) == {"aten.mul.Tensor": 3}


def test_branches_come_from_one_composition(randomise: Randomise) -> None:
    graph, _ = capture("conv", randomise)
    branched = Branch()(graph).graph_module
    assert inserted(graph, branched) == {"composition": 1, "<built-in function getitem>": 3}
    assert difference(graph, branched) == [
        "-conv2d = conv2d(x, a_weight)",
        "+composition = composition()",
        "+getitem = getitem(composition, 0)",
        "+getitem_1 = getitem(getitem, a.weight)",
        "+getitem_2 = getitem(getitem, b.weight)",
        "+conv2d = conv2d(x, getitem_1)",
        "-linear = linear(mean, b_weight, b_bias)",
        "+linear = linear(mean, getitem_2, b_bias)",
    ]
    assert isinstance(branched.get_submodule("composition"), Composition)
    assert difference(graph, Merge()(branched).graph_module) == []


def test_axes_as_text(randomise: Randomise) -> None:
    graph, _ = capture("attention", randomise)
    axes = {node.name: node.meta[AXES] for node in Propagate()(graph).graph_module.graph.nodes if AXES in node.meta}
    head, width = axes["view"][3:]
    assert head.endswith(":2")
    assert width.endswith(":2")
    assert head != width
    assert axes["view"][:3] == ["1000003", "5", "3"]
    assert axes["linear_1"] == ["1000003", "5", f"3·{head}·{width}"]
    assert axes["qkv_weight"] == [f"3·{head}·{width}", f"{head}·{width}"]
    assert axes["e_weight"] == [f"{head}·{width}", "3"]
    assert axes["o_weight"] == ["2", f"{head}·{width}"]
    assert axes["matmul"] == ["1000003", head, "5", "5"]


def test_notes_say_what_stays(randomise: Randomise) -> None:
    graph, _ = capture("conv", randomise)
    for step in (Propagate(), Widen()):
        notes = step(graph).notes
        assert "output at linear: it is an output of the model (b.weight[0], b.bias[0], b.bias)" in notes
        assert any(note.startswith("aten.conv2d.default at conv2d: ") and "a.weight[1]" in note for note in notes)


# ------------------------------------------------------------------------------------------------------- errors


def test_widening_takes_captured_graphs_only() -> None:
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    traced = fx.symbolic_trace(Traced())
    for step in (Widen(), Propagate()):
        message = (
            rf"^{step.name}: node 'layer' \(call_module layer\) is not a captured ATen call; run the pass Normalize"
        )
        with pytest.raises(PassError, match=message):
            step(traced)
    with pytest.raises(PassError, match=r"^Widen takes an fx\.GraphModule, got Traced; capture a model with gpd_fx"):
        Widen()(Traced())  # pyright: ignore[reportArgumentType]  that is the test


def test_a_pass_that_lacks_another_says_which(randomise: Randomise) -> None:
    graph, _ = capture("conv", randomise)
    wide = Widen()(graph).graph_module
    branched = Branch()(wide).graph_module
    with pytest.raises(PassError, match="Fold: the graph was not made by the pass Widen"):
        Fold()(graph)
    with pytest.raises(PassError, match="Fold: the graph has branches; run the pass Merge first"):
        Fold()(branched)
    with pytest.raises(PassError, match="Branch: the graph has branches already; run the pass Merge first"):
        Branch()(branched)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((Fold(),), "^pass Fold: Fold: the graph was not made by the pass Widen"),
        ((Widen(), Branch(), Fold()), r"^pass Fold \(after Widen, Branch\): Fold: the graph has branches; run"),
        ((Branch(), Branch()), r"^pass Branch \(after Branch\): Branch: the graph has branches already"),
        (
            (Propagate(), Pipeline((Widen(), Branch(), Fold()))),
            r"^pass Pipeline \(after Propagate\): pass Fold \(after Wid",
        ),
    ],
)
def test_a_failing_pipeline_names_the_pass_and_those_before(
    randomise: Randomise, passes: tuple[Pass, ...], message: str
) -> None:
    graph, _ = capture("conv", randomise)
    with pytest.raises(PassError, match=message):
        Pipeline(passes)(graph)


def test_options_are_checked(randomise: Randomise) -> None:
    graph, _ = capture("conv", randomise)
    with pytest.raises(ArgumentError, match=r"ratio is 0\.5; an expansion ratio must be"):
        Widen(0.5)(graph)
    with pytest.raises(ArgumentError, match=r"^pass Widen: the ratio glob 'nothing\*' matches no parameter"):
        Pipeline((Widen({"nothing*": 2.0}),))(graph)
    with pytest.raises(ArgumentError, match=r"^pass Branch \(after Widen\): branches: there is no branch '7x7'"):
        Pipeline((Widen(), Branch("7x7")))(graph)


def test_merging_without_branches_changes_nothing(randomise: Randomise) -> None:
    graph, _ = capture("conv", randomise)
    result = Merge()(graph)
    assert not result.modified
    assert result.graph_module is graph
    assert result.notes == (
        "the graph has no branches; saw 1 aten.conv2d.default, 1 aten.batch_norm.default, 1 aten.relu.default, "
        "1 aten.mean.dim and 1 more kinds",
    )


def test_ratio_one_changes_nothing(randomise: Randomise) -> None:
    graph, x = capture("conv", randomise)
    result = Widen(1.0)(graph)
    assert not result.modified
    assert torch.equal(result.graph_module(x), graph(x))


def test_a_pass_of_ones_own_fits_in(randomise: Randomise) -> None:
    class CountConvs(Pass):
        def run(self, module: fx.GraphModule) -> PassResult:
            count = sum("conv" in str(node.target) for node in module.graph.nodes if node.op == "call_function")
            return PassResult(module, False, (f"{count} convs",))

    graph, _ = capture("shuffle", randomise)
    result = Pipeline((Widen(), CountConvs(), Branch()))(graph)
    assert "3 convs" in result.notes


# ------------------------------------------------------------------------------------------- a teacher as a graph


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_trained_teacher_merges_into_a_plain_wide_model(randomise: Randomise, mode: Any) -> None:
    model = randomise(ConvNet()).double()
    x = torch.randn(4, 3, 5, 5, dtype=D)
    teacher = gpd_fx.expand(model, 2.0, (x,)).train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05)
    for output in teacher.both(x):
        output.square().mean().backward(retain_graph=True)
    optimizer.step()
    teacher.train(mode == "train")
    graph = teacher.as_graph(mode)
    merged = Merge()(graph)
    assert merged.modified
    assert {name for name, _ in merged.graph_module.named_parameters()} == {
        name for name, _ in model.named_parameters()
    }
    twin = copy.deepcopy(teacher)
    assert relative_error(twin(x), merged.graph_module(x)) <= 1e-12
    assert "composition" not in dict(merged.graph_module.named_children())
