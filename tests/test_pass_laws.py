"""Laws of every pass, on random models and on a dozen hand-written ones.

After every pass of a chain: the values that nodes record are those that torch's `FakeTensorProp` finds for a concrete
batch; the argument is as it was; parameters are shared or new as the pass declares; the function is the same. In the
end the result goes through `torch.export` and a file, and still is the same function.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx.graph import CodeGen
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

import gpd_fx
from bench.zoo.check import randomise, switch_off_randomness
from bench.zoo.handwritten import MODELS
from gpd_fx.capture.capture import Mode
from gpd_fx.fxtools.torch_internals import flat_inputs
from gpd_fx.passes import (
    Branch,
    Fold,
    FuseDepthwise,
    Merge,
    Normalize,
    Pass,
    PassResult,
    Pipeline,
    Propagate,
    Widen,
)
from gpd_fx.passes.widen import EXACT
from gpd_fx.verify.verification import relative_error
from tests.graph_check import nudge, open_batch
from tests.graph_laws import close, quiet, same_state
from tests.graphs import RandomNet, draw_program, example

CHAINS: dict[str, tuple[Pass, ...]] = {
    "twice": (Normalize(), Widen(1.5), Widen(2.0)),
    "branches": (Normalize(), Widen(2.0), Branch(), Merge()),
    "again": (Branch(), Merge(), Widen(2.0), Propagate(), Branch(), Merge(), Normalize()),
}
ZOO: dict[str, tuple[str, Mode]] = {
    "unet": ("twice", "train"),
    "super_resolution": ("branches", "eval"),
    "standardised": ("again", "train"),
    "ghost": ("branches", "train"),
    "squeeze_excite": ("twice", "eval"),
    "cross_covariance": ("branches", "eval"),
    "grouped_queries": ("again", "eval"),
    "einsums": ("twice", "eval"),
    "normed": ("again", "eval"),
    "cuts": ("branches", "train"),
    "lstm": ("again", "eval"),
    "buffers": ("twice", "train"),
    "windows": ("branches", "eval"),
}
RANDOM = 12
STALE_LSTM = pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="torch 2.11 records the states of an lstm with one dimension too many where sizes are symbolic",
)


def recorded(module: fx.GraphModule, batch: int) -> dict[str, Any]:
    """Shape, dtype and device of each recorded tensor, with a number in the place of the symbolic batch."""

    def number(extent: Any) -> int:
        expr = getattr(getattr(extent, "node", None), "expr", None)
        return int(extent) if expr is None else int(expr.xreplace(dict.fromkeys(expr.free_symbols, batch)))

    def show(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(map(number, value.shape)), value.dtype, value.device
        return None

    return {
        node.name: pytree.tree_map(show, node.meta.get("val")) for node in module.graph.nodes if node.op != "output"
    }


def found_by_torch(module: fx.GraphModule, inputs: Sequence[Any], batch: int) -> dict[str, Any]:
    """The same as torch's `FakeTensorProp` finds it for concrete inputs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        twin = copy.deepcopy(module)
    for node in twin.graph.nodes:
        node.meta.pop("val", None)
    flat = flat_inputs(twin, tuple(inputs), {})
    twin.graph.set_codegen(CodeGen())
    with torch.no_grad():
        FakeTensorProp(twin, mode).propagate(*flat)
    return recorded(twin, batch)


def run(module: Any, inputs: Sequence[Any]) -> Any:
    """The output for an input, of a copy, so that running statistics stay."""
    with torch.no_grad():
        return copy.deepcopy(module)(*pytree.tree_map_only(Tensor, torch.clone, tuple(inputs)))


def obey(step: Pass, module: fx.GraphModule, inputs: Sequence[Any], batch: int) -> PassResult:
    """Run a pass and hold it to the laws that concern it alone."""
    text, state = module.code, {name: tensor.clone() for name, tensor in module.state_dict().items()}
    values = recorded(module, batch)
    result = step(module)
    made = result.graph_module
    assert (module.code, recorded(module, batch)) == (text, values)
    same_state(state, module.state_dict())
    assert recorded(made, batch) == found_by_torch(made, inputs, batch)
    if made is not module:
        ours, theirs = ({id(p) for p in m.parameters()} for m in (module, made))
        assert theirs <= ours if step.parameters == "shared" else not theirs & ours
    return result


def follow(chain: Sequence[Pass], graph: fx.GraphModule, inputs: Sequence[Any], batch: int) -> fx.GraphModule:
    """Run passes one after another, each held to the laws and to the function of the graph."""
    expected = run(graph, inputs)
    for step in chain:
        result = obey(step, graph, inputs, batch)
        graph = result.graph_module
        close(expected, run(graph, inputs), lambda graph=graph: run(graph, nudge(tuple(inputs))), step.name)
    return graph


def again_from_a_file(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """The module that export, a file and loading make of a graph."""
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves(tuple(inputs)):
        if isinstance(leaf, Tensor) and leaf.dim() and open_batch(graph):
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    program = torch.export.export(graph, tuple(inputs), dynamic_shapes=shapes, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("number", range(RANDOM))
def test_laws_on_random_models(number: int) -> None:
    program = draw_program(Random(f"pass laws {number}"))
    chain = CHAINS[list(CHAINS)[number % len(CHAINS)]]
    with quiet():
        model = RandomNet(program)
        mode: Mode = "train" if number % 2 else "eval"
        graph = gpd_fx.capture(model, example(program, 2, 0), mode=mode)
        batch = 3 if open_batch(graph) else 2
        inputs = example(program, batch, 7)
        made = follow(chain, graph, inputs, batch)
        loaded = again_from_a_file(made, inputs)
        close(run(made, inputs), run(loaded, inputs), lambda: run(made, nudge(inputs)), "the loaded program")


@pytest.mark.parametrize("name", [pytest.param(n, marks=STALE_LSTM) if n == "lstm" else n for n in ZOO])
def test_laws_on_models_of_the_zoo(name: str) -> None:
    entry, (chain, mode) = MODELS[f"own:{name}"], ZOO[name]
    model = switch_off_randomness(randomise(entry.build().double()))
    args, kwargs = entry.inputs()
    assert not kwargs
    graph = gpd_fx.capture(model, args, mode=mode)
    close(run(model.train(mode == "train"), args), run(graph, args), lambda: 0, "the capture")
    made = follow(CHAINS[chain], graph, args, 2)
    assert sum(p.numel() for p in made.parameters()) > sum(p.numel() for p in model.parameters())
    loaded = again_from_a_file(made, args)
    close(run(made, args), run(loaded, args), lambda: run(made, nudge(args)), "the loaded program")


class Separable(nn.Module):
    """A depthwise conv with its batch norm, between two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.depthwise(self.first(x))).relu())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_fused_depthwise_convs_obey_the_laws(mode: Mode) -> None:
    inputs = (torch.randn(3, 3, 5, 7, dtype=torch.float64),)
    graph = gpd_fx.capture(randomise(Separable().double()), inputs, mode=mode)
    made = follow((Widen(1.5), FuseDepthwise()), graph, inputs, 3)
    assert "depthwise_norm" in made.code


@pytest.mark.parametrize("chain", [(Widen(2.0),), (Widen(2.0), Branch()), (Widen(2.0), Branch(), Merge())])
def test_gradients_flow_to_what_a_pass_made(chain: tuple[Pass, ...]) -> None:
    inputs = (torch.randn(3, 3, 5, 7, dtype=torch.float64),)
    graph = gpd_fx.capture(randomise(Separable().double()), inputs, mode="train")
    made = Pipeline(chain, verify=inputs)(graph).graph_module
    made(*inputs).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    assert all(p.grad is None for p in graph.parameters())


def test_widening_twice_is_widening_by_the_product() -> None:
    inputs = (torch.randn(3, 3, 5, 7, dtype=torch.float64),)
    graph = gpd_fx.capture(randomise(Separable().double()), inputs)
    twice = Widen(2.0)(Widen(1.5)(graph).graph_module).graph_module
    once = Widen(3.0)(graph).graph_module
    assert {n: p.shape for n, p in twice.named_parameters()} == {n: p.shape for n, p in once.named_parameters()}


def test_folding_undoes_one_widening_at_a_time() -> None:
    inputs = (torch.randn(3, 3, 5, 7, dtype=torch.float64),)
    graph = gpd_fx.capture(randomise(Separable().double()), inputs)
    wide = Widen(1.5)(graph).graph_module
    back = Fold()(Widen(2.0)(wide).graph_module).graph_module
    for made, source in ((back, wide), (Fold()(back).graph_module, graph)):
        assert made.code == source.code
        for name, tensor in source.state_dict().items():
            assert relative_error(tensor, made.state_dict()[name]) <= 1e-12, name


def test_constants_of_two_widenings_stay_exact_in_float32() -> None:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y / y.norm(dim=-1, keepdim=True)) * y.norm(p=3.0)

    inputs = (torch.randn(3, 3),)
    graph = gpd_fx.capture(randomise(Lengths()), inputs)
    wide = Pipeline((Widen(1.6), Widen(1.5)), verify=inputs)(graph).graph_module
    constants = [str(node.target) for node in wide.graph.find_nodes(op="get_attr") if "_gpd_alpha" in str(node.target)]
    assert set(constants) == set(wide.meta[EXACT])
