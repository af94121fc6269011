"""Brute force for op rules: widen a tiny graph, run it beside the original, compare with copies of its results.

A case is a graph of ATen calls. Its operands are leaves: parameters whose axes are all free to widen, or activations,
which are parameters times an input, so that they depend on the inputs and yet have free axes.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpd_fx.axes.expressions import (
    Atom,
    Expr,
    Reason,
    show,
)
from gpd_fx.passes.widen import GRAPH, widen_graph
from gpd_fx.plan import plan as planning
from gpd_fx.plan import ratios as planned_ratios
from gpd_fx.plan.analysis import Analysis, analyse
from gpd_fx.plan.plan import Plan, make_plan
from gpd_fx.plan.tied_dimensions import Dim

aten = torch.ops.aten
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Leaf:
    """An operand: `kind` says what it becomes in the graph, `value` what it holds."""

    kind: str
    value: Tensor = field(compare=False)


def _normal(shape: tuple[int, ...], low: float | None) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 7 * len(shape))
    if low is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.rand(shape, generator=generator, dtype=torch.float64) + low


def W(*shape: int, low: float | None = None) -> Leaf:
    """A weight: normal values, or uniform ones from `low` on."""
    return Leaf("weight", _normal(shape, low))


def A(*shape: int, low: float | None = None) -> Leaf:
    """An activation with free axes."""
    return Leaf("activation", _normal(shape, low))


def B(*shape: int) -> Leaf:
    """A boolean activation with free axes."""
    return Leaf("mask", _normal(shape, None))


def N(*shape: int) -> Leaf:
    """An activation of integers 0 and 1 with free axes."""
    return Leaf("integers", _normal(shape, None))


def X(*shape: int) -> Leaf:
    """An input of the graph; its axes are frozen."""
    return Leaf("input", _normal(shape, None))


def K(values: Any) -> Leaf:
    """A constant, such as a table of indices; it enters as an input does."""
    return Leaf("input", torch.as_tensor(values))


Node: TypeAlias = Any  # what a case's function gets and gives: nodes, or tuples of them


class Build:
    """Records calls of ATen overloads: `b("add.Tensor", x, y)`."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.inputs: list[Tensor] = []
        self.scalar = self.input(torch.tensor(0.75, dtype=torch.float64))

    def input(self, value: Tensor) -> fx.Node:
        """A placeholder and its value."""
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = value
        self.inputs.append(value)
        return node

    def leaf(self, leaf: Leaf) -> fx.Node:
        """The node of an operand."""
        if leaf.kind == "input":
            return self.input(leaf.value)
        name = f"p{len(list(self.root.parameters()))}"
        self.root.register_parameter(name, nn.Parameter(leaf.value))
        node = self.graph.get_attr(name)
        node.meta["val"] = leaf.value
        if leaf.kind == "weight":
            return node
        node = self("mul.Tensor", node, self.scalar)
        if leaf.kind in ("mask", "integers"):
            node = self("gt.Scalar", node, 0)
        return self("to.dtype", node, torch.int64) if leaf.kind == "integers" else node

    def __call__(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Append a call; several results come as a tuple of nodes."""
        target = overload(op)
        node = self.graph.call_function(target, args, kwargs)

        def value(item: Any) -> Any:
            held = item.meta["val"] if isinstance(item, fx.Node) else item
            return held.clone() if isinstance(held, Tensor) else held

        with torch.no_grad():
            result = target(*pytree.tree_map(value, args), **pytree.tree_map(value, kwargs))
        node.meta["val"] = result
        if isinstance(result, Tensor | int):
            return node
        return tuple(self._item(node, k, item) for k, item in enumerate(result))

    def _item(self, node: fx.Node, k: int, value: Any) -> fx.Node:
        item = self.graph.call_function(operator.getitem, (node, k))
        item.meta["val"] = value
        return item


def overload(name: str) -> Any:
    """`add.Tensor` -> torch.ops.aten.add.Tensor."""
    packet, _, kind = name.partition(".")
    return getattr(getattr(aten, packet), kind)


@dataclass(frozen=True)
class Case:
    """Calls under test, and which axes widen.

    `widens` is read as an einsum: `"nc.., oc.., o -> no.."` names the axes of the leaves that are not inputs and those
    of the results. A dot is an axis that stays; equal letters are axes with equal copies.
    """

    name: str
    widens: str
    leaves: tuple[Leaf, ...]
    make: Callable[..., Node]


@dataclass(frozen=True)
class Graph:
    """A case made into a graph. `leaves` are those that are not inputs, `probes` stand for the results."""

    module: fx.GraphModule
    inputs: list[Tensor]
    leaves: list[fx.Node]
    probes: list[fx.Node]

    def ops(self) -> set[str]:
        """Names of the ATen overloads that are called."""
        return {str(n.target).removeprefix("aten.") for n in self.module.graph.nodes if n.op == "call_function"}


def case(op: str, widens: str, *args: Any, **kwargs: Any) -> Case:
    """One call of one overload; leaves may stand anywhere in the arguments."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    places = [k for k, item in enumerate(flat) if isinstance(item, Leaf)]

    def make(b: Build, *nodes: fx.Node) -> Node:
        items = list(flat)
        for k, node in zip(places, nodes, strict=True):
            items[k] = node
        given, named = pytree.tree_unflatten(items, spec)
        return b(op, *given, **named)

    return Case(op, widens, tuple(flat[k] for k in places), make)


def chain(name: str, widens: str, make: Callable[..., Node], *leaves: Leaf) -> Case:
    """Several calls: `make(build, *nodes of the leaves)` returns the nodes to compare."""
    return Case(name, widens, leaves, make)


def build(case: Case) -> Graph:
    """The graph of a case. It returns nothing, since an output would freeze what it returns."""
    b = Build()
    leaves = [b.leaf(leaf) for leaf in case.leaves]
    free = [node for node, leaf in zip(leaves, case.leaves, strict=True) if leaf.kind != "input"]
    results = [node for node in pytree.tree_leaves(case.make(b, *leaves)) if isinstance(node, fx.Node)]
    probes = [b("alias.default", node) for node in results]
    b.graph.output(())
    return Graph(fx.GraphModule(b.root, b.graph), b.inputs, free, probes)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node gave, as it was then."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n.name] = pytree.tree_map_only(Tensor, torch.clone, result)
        return result


def values(module: fx.GraphModule, inputs: list[Tensor]) -> dict[str, Any]:
    """What each node of a graph gives; parameters that change in place are put back."""
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*[tensor.clone() for tensor in inputs])
        for name, tensor in module.named_parameters():
            tensor.copy_(before[name])
    return recorder.values


def copies(plan: Plan, tensor: Tensor, axes: list[Expr]) -> Tensor:
    """The copies of a result that a plan promises."""
    for dim, axis in enumerate(axes):
        if plan.widening.widens(axis):
            tensor = tensor.index_select(dim, plan.widening.gather(axis))
    return tensor


def difference(expected: Tensor, actual: Tensor) -> str | None:
    """How two results differ, or None."""
    if expected.shape != actual.shape:
        return f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    if expected.is_floating_point() or expected.is_complex():
        scale = expected.nan_to_num(0, 0, 0).abs().max().item() if expected.numel() else 0.0
        if torch.allclose(actual, expected, rtol=0, atol=TOLERANCE * max(scale, 1e-3), equal_nan=True):
            return None
        return f"error {(actual - expected).abs().max().item():.1e} of {scale:.1e}"
    return None if torch.equal(expected, actual) else "other integers"


@dataclass
class Checked:
    """A case analysed: `faults` are rules that raised."""

    case: Case
    graph: Graph
    analysis: Analysis
    expected: dict[str, Any]

    @staticmethod
    def of(case: Case) -> Checked:
        """Build, analyse, and run the original."""
        graph = build(case)
        return Checked(case, graph, analyse({GRAPH: graph.module}), values(graph.module, graph.inputs))

    def axes(self, node: fx.Node) -> list[Expr]:
        """The axes of a node."""
        found = self.analysis.graphs[GRAPH].values[node]
        assert isinstance(found, list)
        return [self.analysis.solver.resolve(axis) for axis in found]

    def wide(self, plan: Plan) -> fx.GraphModule:
        """The wide graph, with copies of the parameters."""

        def tensor(name: str, old: Tensor) -> Tensor:
            shaped = plan.tensors[name]
            with torch.no_grad():
                wide = shaped.widen(old.detach())
                assert torch.equal(shaped.student(wide), old), f"{name}: not a slice of its copies"
                return nn.Parameter(shaped.scale(wide))

        return widen_graph(plan, GRAPH, tensor)

    def problems(self, plan: Plan) -> list[str]:
        """What differs between the wide graph and copies of the original's results."""
        found: list[str] = []
        actual = values(self.wide(plan), self.graph.inputs)
        for probe in self.graph.probes:
            axes = self.axes(probe)
            wrong = difference(copies(plan, self.expected[probe.name], axes), actual[probe.name])
            if wrong:
                found.append(f"{probe.name} [{', '.join(map(show, axes))}]: {wrong}")
        return found

    def widths(self, plan: Plan) -> str:
        """What widened, in the notation of `Case.widens`: its letters where they are right, `?` where they are not."""
        left, _, right = self.case.widens.replace(" ", "").partition("->")
        known: dict[str, Tensor] = {}
        sides: list[str] = []
        for nodes, side in ((self.graph.leaves, left), (self.graph.probes, right)):
            terms = [*side.split(","), *[""] * len(nodes)]
            sides.append(",".join(self._letters(plan, n, term, known) for n, term in zip(nodes, terms, strict=False)))
        return "->".join(sides)

    def _letters(self, plan: Plan, node: fx.Node, term: str, known: dict[str, Tensor]) -> str:
        axes = self.axes(node)
        found = "".join(
            _letter(plan, axis, c, known) for axis, c in zip(axes, term.ljust(len(axes), "?"), strict=False)
        )
        return found + "?" * (len(term) > len(axes))


def _letter(plan: Plan, axis: Expr, given: str, known: dict[str, Tensor]) -> str:
    if not plan.widening.widens(axis):
        return "."
    gather = plan.widening.gather(axis)
    if given in ".?":
        return "?"
    return given if torch.equal(known.setdefault(given, gather), gather) else "?"


_RATIOS = (2.0, 1.34, 2.67, 1.67, 3.0, 2.34)  # equal sizes then differ once they are widened


@contextmanager
def _own_ratios(seed: int) -> Generator[None]:
    """Plans made inside give each atom a ratio of its own, and unless the seed is 0 hold some atoms back."""
    rng = random.Random(seed)
    one_per_product = vars(planning)["_one_per_product"]
    ratios = cycle(rng.sample(_RATIOS, len(_RATIOS)) if seed else _RATIOS)
    drawn: dict[Atom, float] = {}

    def hold(analysis: Analysis, candidates: list[Atom], held: dict[Atom, Reason]) -> None:
        for atom, ratio in zip(candidates, ratios, strict=False):
            drawn[atom] = ratio
            if seed and rng.random() < 0.3:
                held[atom] = Reason("test", "", "held back")
        one_per_product(analysis, candidates, held)

    def asked(*_: object) -> dict[Atom, list[Any]]:
        ask = vars(planned_ratios)["_Ask"]
        return {atom: [ask(Dim("test", 0), ratio, "*")] for atom, ratio in drawn.items()}

    held_back = patch("gpd_fx.plan.plan._one_per_product", hold)
    with held_back, patch("gpd_fx.plan.ratios._asked", asked), patch("gpd_fx.plan.ratios._idle", return_value=[]):
        yield


def plans(analysis: Analysis) -> Iterator[tuple[str, Plan, bool]]:
    """Plans to try, and whether they widen all that can: whole ratios, an uneven one, own ratios, holding back."""
    for ratio in (2.0, 3.0, 1.5):
        yield f"ratio {ratio}", make_plan(analysis, ratio, seed=int(10 * ratio)), True
    for seed in range(3):
        with _own_ratios(seed):
            yield f"own ratios {seed}", make_plan(analysis, {"*": 2.0}, seed=seed), seed == 0
