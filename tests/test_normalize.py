"""Graphs in every form that people hold go through Normalize and the passes behind it, and stay the same function."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.shape_prop import ShapeProp

import gpd_fx
from bench.zoo.check import randomise as randomised
from gpd_fx.capture.capture import Mode
from gpd_fx.errors import CaptureError, PassError
from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.passes import (
    Branch,
    Merge,
    Normalize,
    Pass,
    PassResult,
    Pipeline,
    Widen,
)
from gpd_fx.passes.raising import RAISINGS
from gpd_fx.rules.table import rule_of
from gpd_fx.verify.verification import relative_error
from tests.test_pass_laws import found_by_torch, recorded

Randomise = Callable[[nn.Module], nn.Module]
D = torch.float64
aten = torch.ops.aten


class ConvNet(nn.Module):
    """Batch norm, a residual block with a depthwise conv, both kinds of pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.depthwise, self.inner = nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.BatchNorm2d(5, momentum=0.3)
        self.point, self.pool = nn.Conv2d(5, 5, 1), nn.MaxPool2d(2)
        self.up, self.group, self.head = nn.ConvTranspose2d(5, 7, 2), nn.GroupNorm(1, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.point(F.relu6(self.inner(self.depthwise(x))))
        x = self.group(self.up(self.pool(x)))
        return self.head(F.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1), 0.0, self.training))


class Transformer(nn.Module):
    """Patches, layer norm, attention, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, 6, 2, stride=2), nn.Parameter(torch.zeros(1, 4, 6))
        self.first, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.second, self.up, self.down, self.head = (
            nn.LayerNorm(6),
            nn.Linear(6, 10),
            nn.Linear(10, 6),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        n, t, c = x.shape
        q, k, v = self.qkv(self.first(x)).view(n, t, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(x.mean(1))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "conv": (ConvNet, (3, 6, 6)),
    "transformer": (Transformer, (3, 4, 4)),
}
MODES: tuple[Mode, ...] = ("eval", "train")
FORMS = ("captured", "program", "module", "lifted", "decomposed", "decomposed module", "decomposed lifted", "traced")
PIPELINE = (Widen(2.0), Branch(), Merge())


def export(model: nn.Module, x: Tensor) -> ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)


@functools.cache
def programs(net: str, mode: Mode) -> tuple[nn.Module, ExportedProgram, ExportedProgram]:
    """A model with random values, its program, and that after decomposition; no pass changes them."""
    make, shape = NETS[net]
    model = randomised(make()).double().train(mode == "train")
    program = export(model, torch.randn(2, *shape, dtype=D))
    return model, program, program.run_decompositions()


def in_form(form: str, net: str, mode: Mode) -> tuple[Any, Normalize]:
    """A model in one of the forms, and the pass that takes it."""
    model, plain, decomposed = programs(net, mode)
    x = torch.randn(2, *NETS[net][1], dtype=D)
    if form == "captured":
        return gpd_fx.capture(model, (x,), mode=mode), Normalize()
    if form == "traced":
        return fx.symbolic_trace(model), Normalize((x,))
    program = decomposed if "decomposed" in form else plain
    if "module" in form:
        return program.module(), Normalize()
    return (program.graph_module, Normalize(program=program)) if "lifted" in form else (program, Normalize())


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the buffers afterwards, of a copy."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        return module(x), dict(module.named_buffers())


def ops(module: fx.GraphModule) -> Counter[str]:
    return Counter(op_name(node.target) for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("net", NETS)
def test_every_form_goes_through_all_passes(net: str, form: str, mode: Mode) -> None:
    model = programs(net, mode)[0]
    given, normalize = in_form(form, net, mode)
    steps: list[PassResult] = []

    def check(name: str, result: PassResult) -> None:
        steps.append(result)
        made = result.graph_module
        assert recorded(made, 3) == found_by_torch(made, (x,), 3), name
        output, buffers = run(made, x)
        assert relative_error(expected, output) <= 1e-9, name
        wide = 1 if name == "Normalize" else 2
        for key in buffers.keys() & statistics.keys():  # of an eval graph only those that it reads
            copies = statistics[key].repeat(wide) if statistics[key].dim() else statistics[key]
            assert relative_error(copies, buffers[key]) <= 1e-9, (name, key)

    x = torch.randn(3, *NETS[net][1], dtype=D)
    expected, statistics = run(model, x)
    result = Pipeline((normalize, *PIPELINE), after=check)(given)
    assert [step.modified for step in steps] == [form != "captured", True, True, True]
    first, made = steps[0].graph_module, result.graph_module
    held = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert {name: id(parameter) for name, parameter in first.named_parameters()} == held
    widest = max(p.numel() / model.get_parameter(name).numel() for name, p in made.named_parameters())
    assert widest == 4
    assert sum(p.numel() for p in made.parameters()) > 2 * sum(p.numel() for p in model.parameters())
    branched = [str(node.args[1]) for node in steps[2].graph_module.graph.nodes if "getitem" in str(node.target)]
    weights = {n for n, p in model.named_parameters() if p.dim() > 1 and n != "place"}
    assert weights <= set(branched)
    if mode == "train" and net == "conv":
        assert statistics["norm.num_batches_tracked"] == 1 + model.get_buffer("norm.num_batches_tracked")
        assert relative_error(statistics["norm.running_mean"], model.get_buffer("norm.running_mean")) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", NETS)
def test_all_forms_give_one_graph(net: str, mode: Mode) -> None:
    """But for attention, which the decompositions leave in its parts."""
    layers = ("conv", "linear", "norm", "pool2d")
    counts = [
        Counter({op: n for op, n in ops(normalize(given).graph_module).items() if any(layer in op for layer in layers)})
        for given, normalize in (in_form(form, net, mode) for form in FORMS)
    ]
    assert counts[0]
    if net == "conv":  # a mean over both dimensions is what the decompositions make of global pooling
        for count in counts:
            del count["aten.adaptive_avg_pool2d.default"]
    assert all(count == counts[0] for count in counts[1:])


def test_the_given_program_is_left_alone(randomise: Randomise) -> None:
    model = randomise(ConvNet()).double().train()
    x = torch.randn(2, 3, 6, 6, dtype=D)
    program = export(model, x).run_decompositions()
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    code = program.graph_module.code
    graph = Normalize()(program).graph_module
    graph(x)  # updates its own statistics
    assert program.graph_module.code == code
    for name, tensor in program.state_dict.items():
        assert torch.equal(tensor, before[name]), name
    assert relative_error(before["norm.running_mean"], graph.get_buffer("norm.running_mean")) > 1e-3


def test_a_normalised_graph_stays_as_it_is(randomise: Randomise) -> None:
    program = export(randomise(ConvNet()).double(), torch.randn(2, 3, 6, 6, dtype=D)).run_decompositions()
    once = Normalize()(program)
    again = Normalize()(once.graph_module)
    assert "raised 3 aten.convolution.default to aten.conv2d.default" in once.notes
    assert not again.modified
    assert again.graph_module is once.graph_module
    assert again.notes == ("the graph is in the form that passes take",)


# ------------------------------------------------------------------------------------------------- single core ops


def decomposed(function: Callable[..., Any], *inputs: Tensor, **members: Any) -> tuple[nn.Module, fx.GraphModule]:
    """A module of one function, and its decomposed program normalised."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, member in members.items():
                if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                    self.register_buffer(name, member)
                else:
                    setattr(self, name, member)

        def forward(self, *inputs: Tensor) -> Any:
            return function(self, *inputs)

    model = Net()
    program = torch.export.export(model, inputs, strict=False).run_decompositions()
    return model, Normalize()(program).graph_module


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=D))


def some(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D)


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any], str]] = {
    "conv1d": (
        lambda m, x: F.conv1d(x, m.w, m.b, 2, 1),
        (some(2, 3, 7),),
        {"w": weight(4, 3, 3), "b": weight(4)},
        "conv1d.default",
    ),
    "conv3d": (lambda m, x: F.conv3d(x, m.w), (some(2, 3, 4, 4, 4),), {"w": weight(4, 3, 2, 2, 2)}, "conv3d.default"),
    "same padding": (
        lambda m, x: F.conv2d(x, m.w, padding="same"),
        (some(2, 3, 5, 5),),
        {"w": weight(4, 3, 3, 3)},
        "conv2d.default",
    ),
    "transposed": (
        lambda m, x: F.conv_transpose2d(x, m.w, None, 2, 1, 1, 2),
        (some(2, 4, 5, 5),),
        {"w": weight(4, 3, 3, 3)},
        "conv_transpose2d.input",
    ),
    "linear of rank 2": (lambda m, x: F.linear(x, m.w), (some(5, 3),), {"w": weight(4, 3)}, "linear.default"),
    "linear of rank 4": (
        lambda m, x: F.linear(x, m.w, m.b),
        (some(2, 3, 4, 3),),
        {"w": weight(4, 3), "b": weight(4)},
        "linear.default",
    ),
    "linear of a transposed input": (
        lambda m, x: F.linear(x.mT, m.w, m.b),
        (some(2, 3, 5),),
        {"w": weight(4, 3), "b": weight(4)},
        "linear.default",
    ),
    "linear twice": (
        lambda m, x: F.linear(F.linear(x, m.w), m.w),
        (some(2, 5, 3),),
        {"w": weight(3, 3)},
        "linear.default",
    ),
    "normed weight": (
        lambda m, x: F.linear(x, m.w / m.w.norm(dim=1, keepdim=True)),
        (some(2, 5, 3),),
        {"w": weight(4, 3)},
        "linear.default",
    ),
    "group norm": (lambda m, x: F.group_norm(x, 2, m.w), (some(3, 4, 5),), {"w": weight(4)}, "group_norm.default"),
    "layer norm": (lambda m, x: F.layer_norm(x, (4, 5)), (some(3, 4, 5),), {}, "layer_norm.default"),
    "softmax": (lambda m, x: x.softmax(1), (some(3, 4, 5),), {}, "softmax.int"),
    "log softmax": (lambda m, x: x.log_softmax(-1), (some(3, 4, 5),), {}, "log_softmax.int"),
    "batch norm without statistics": (
        lambda m, x: F.batch_norm(x, None, None, m.w, training=True),
        (some(3, 4, 5),),
        {"w": weight(4)},
        "batch_norm.default",
    ),
    "batch norm twice": (
        lambda m, x: F.batch_norm(F.batch_norm(x, m.mean, m.var, training=True).relu(), m.mean, m.var, training=True),
        (some(3, 4, 5),),
        {"mean": some(4), "var": some(4).abs()},
        "batch_norm.default",
    ),
    "sampled": (
        lambda m, x, y: F.grid_sample(x, y.tanh(), align_corners=True),
        (some(2, 3, 5, 5), some(2, 4, 4, 2)),
        {},
        "grid_sampler.default",
    ),
    "distances": (lambda m, x, y: torch.cdist(x, y), (some(5, 3), some(4, 3)), {}, "cdist.default"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_core_op_is_raised(name: str) -> None:
    function, inputs, members, op = CASES[name]
    members = {key: nn.Parameter(t) if isinstance(t, nn.Parameter) else t.clone() for key, t in members.items()}
    model, graph = decomposed(function, *inputs, **members)
    assert ops(graph)[f"aten.{op}"] == (2 if "twice" in name else 1)
    assert not {op_name(n.target) for n in graph.graph.nodes} & (
        set(RAISINGS) - {"aten.mm.default", "aten.bmm.default"}
    )
    with torch.no_grad():
        twin = copy.deepcopy(graph)
        assert relative_error(model(*inputs), twin(*inputs)) <= 1e-12
    for key, buffer in model.named_buffers():
        assert relative_error(buffer, twin.get_buffer(key)) <= 1e-12
    assert all(rule_of(n.target) is not None for n in graph.graph.nodes if op_name(n.target).startswith("aten."))


def test_statistics_that_are_read_after_their_update_stay_functional() -> None:
    """What reads the old statistics behind the norm would see the new ones."""
    function: Callable[..., Any] = lambda m, x: (m.mean * 1, F.batch_norm(x, m.mean, m.var, None, None, True))[::-1]  # noqa: E731
    model, graph = decomposed(function, some(3, 4, 5), mean=some(4), var=some(4).abs())
    x = some(3, 4, 5)
    twin, expected = copy.deepcopy(graph), model(x)
    assert relative_error(expected, twin(x)) <= 1e-12
    assert relative_error(model.get_buffer("mean"), twin.get_buffer("mean")) <= 1e-12


def test_products_of_activations_stay_products() -> None:
    _, graph = decomposed(
        lambda m, x, y: (x @ y.t(), torch.addmm(m.b, x, m.w)), some(5, 3), some(4, 3), w=weight(3, 4), b=weight(4)
    )
    assert "aten.linear.default" not in ops(graph)
    assert ops(graph)["aten.addmm.default"] == 1


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten._scaled_dot_product_flash_attention_for_cpu.default, ()),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (0.0, True)),
        (aten._softmax.default, None),
        (aten.native_dropout.default, None),
        (aten._native_batch_norm_legit_no_training.default, None),
    ],
)
def test_ops_that_only_some_backends_leave(op: Any, args: tuple[Any, ...] | None) -> None:
    """Written by hand, since whether a decomposition leaves them depends on torch's version and device."""
    if args is not None:
        inputs: tuple[Any, ...] = tuple(some(2, 3, 4, 5).float() for _ in range(3))
        rest: tuple[Any, ...] = args
    elif op is aten._softmax.default:
        inputs, rest = (some(3, 4),), (1, False)
    elif op is aten.native_dropout.default:
        inputs, rest = (some(3, 4),), (0.0, True)
    else:
        inputs, rest = (some(3, 4, 5), some(4), some(4), some(4), some(4).abs()), (0.1, 1e-5)

    def call(*given: Tensor) -> Tensor:
        found = op(*given, *rest)
        return found[0] if isinstance(found, tuple) else found

    class Net(nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return call(*given)

    graph = gpd_fx.capture(Net(), inputs)
    assert op_name(op) in ops(graph)
    result = Normalize()(graph)
    assert op_name(op) not in ops(result.graph_module)
    assert relative_error(call(*inputs), result.graph_module(*inputs)) <= 1e-6


# -------------------------------------------------------------------------------------------------- what is refused


def test_a_lifted_graph_needs_its_program(randomise: Randomise) -> None:
    program = export(randomise(ConvNet()).double(), torch.randn(2, 3, 6, 6, dtype=D))
    with pytest.raises(PassError, match=r"^Normalize: the inputs p_stem_weight, .* \(it is the lifted graph of an Exp"):
        Normalize()(program.graph_module)
    other = export(randomise(Transformer()).double(), torch.randn(2, 3, 4, 4, dtype=D))
    with pytest.raises(PassError, match=r"does not have the inputs and outputs that `program` records"):
        Normalize(program=other)(program.graph_module)


def test_a_traced_graph_needs_inputs(randomise: Randomise) -> None:
    traced = fx.symbolic_trace(randomise(ConvNet()).double())
    with pytest.raises(PassError, match=r"^Normalize: node 'stem' is a call_module of 'stem', so the module has to be"):
        Normalize()(traced)
    ShapeProp(traced).propagate(torch.randn(2, 3, 6, 6, dtype=D))
    assert Normalize()(traced).modified  # whose records are enough


def test_modes_that_differ_are_refused(randomise: Randomise) -> None:
    model = randomise(ConvNet()).double().train()
    model.get_submodule("norm").eval()
    with pytest.raises(PassError, match="some submodules are in train mode and some in eval mode"):
        Normalize((torch.randn(2, 3, 6, 6, dtype=D),))(fx.symbolic_trace(model))


def test_other_objects_and_graphs_with_branches_are_refused(randomise: Randomise) -> None:
    with pytest.raises(
        PassError, match=r"^Normalize takes a GraphModule, an ExportedProgram or an nn.Module, got dict"
    ):
        Normalize()({})  # pyright: ignore[reportArgumentType]  that is the test
    graph = gpd_fx.capture(randomise(ConvNet()).double(), (torch.randn(2, 3, 6, 6, dtype=D),))
    with pytest.raises(PassError, match=r"^Normalize: the graph has branches; run the pass Merge first"):
        Normalize()(Branch()(graph).graph_module)

    class Ifs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"^Normalize: torch.export cannot capture Ifs in eval mode"):
        Normalize((torch.randn(2, 3),))(Ifs())


def test_modules_and_graphs_that_others_edited_are_taken(randomise: Randomise) -> None:
    model = randomise(ConvNet()).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=D)
    graph = gpd_fx.capture(model, (x,))

    def with_torch_functions(module: fx.GraphModule) -> None:
        (relu,) = (node for node in module.graph.nodes if node.target is aten.relu.default)
        with module.graph.inserting_before(relu):
            new = module.graph.call_function(torch.relu, relu.args)
        relu.replace_all_uses_with(new)

    def without_values(module: fx.GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=aten.conv2d.default):
            del node.meta["val"]

    for edit in (with_torch_functions, without_values):
        result = Pipeline((edit, Normalize(), *PIPELINE), verify=(x,))(graph)
        assert relative_error(model(x), result.graph_module(x)) <= 1e-9
    made = Normalize({"x": x})(model).graph_module
    assert relative_error(model(x), made(x=x)) <= 1e-12


# ------------------------------------------------------------------------------------------- a pass that does nothing


def test_a_pass_that_does_nothing_says_what_it_saw(randomise: Randomise) -> None:
    program = export(randomise(ConvNet()).double().eval(), torch.randn(2, 3, 6, 6, dtype=D)).run_decompositions()
    core = program.module()
    for node in [node for node in core.graph.nodes if node.target == "_guards_fn"]:
        core.graph.erase_node(node)
    wide = Widen(2.0)(core)
    assert not wide.modified
    assert wide.notes[0].startswith("nothing was widened: saw 4 aten.convolution.default, 2 aten._native_batch_norm")
    assert "which are core ATen ops; run the pass Normalize first" in wide.notes[0]
    branched = Branch()(core)
    assert not branched.modified
    assert "saw 4 aten.convolution.default" in branched.notes[0]
    assert Pipeline((Normalize(), Branch()))(core).modified

    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).cumsum(1)

    plain = gpd_fx.capture(Sum(), (torch.randn(2, 3),))
    steps: list[Pass] = [Widen(2.0), Branch(), Merge()]
    for step in steps:
        result = step(plain)
        assert not result.modified
        assert "saw 1 aten.add.Tensor, 1 aten.cumsum.default" in result.notes[0]
