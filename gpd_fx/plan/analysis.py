"""Axis-factor propagation over captured graphs: which axes are the same, which may widen.

All graphs of one model (its train and eval captures) are analysed together, because they share parameters. A forward
sweep applies each node's rule to the axes of its operands; sweeps repeat until nothing is learnt. Axes of parameters
and of created tensors persist between sweeps, those of activations are computed anew, so no backward rules exist. The
symbolic batch stands as a large prime, which makes every size factor without ambiguity.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gpd_fx.axes.expressions import Expr, Reason, size
from gpd_fx.axes.solver import AxisSolver
from gpd_fx.errors import PassError
from gpd_fx.fxtools.attributes import fetch
from gpd_fx.rules import (
    Axes,
    Site,
    Value,
    rule_of,
)
from gpd_fx.rules.effects import Effect
from gpd_fx.rules.site import Shape, freeze_value, frozen_value

PRIMES = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121, 1000133, 1000151)
_MAX_SWEEPS = 50


@dataclass
class Facts:
    """What the last sweep found for one graph."""

    module: fx.GraphModule
    shapes: dict[fx.Node, Shape]
    from_input: dict[fx.Node, bool]
    values: dict[fx.Node, Value] = field(default_factory=dict[fx.Node, Value])
    effects: dict[fx.Node, list[Effect]] = field(default_factory=dict[fx.Node, "list[Effect]"])


@dataclass
class Analysis:
    """Everything known about a model's axes. `tensors` holds the axes of parameters and buffers by canonical name."""

    solver: AxisSolver
    graphs: dict[str, Facts]
    tensors: dict[str, Axes]
    canonical: dict[str, str]  # every name of a parameter or buffer -> the first name of the same tensor
    parameters: dict[str, Tensor]  # by canonical name
    equal: list[tuple[Expr, Reason]] = field(default_factory=list[tuple[Expr, Reason]])
    shunned: list[Expr] = field(default_factory=list[Expr])
    faults: list[Reason] = field(default_factory=list[Reason])
    sweeps: int = 0

    def tensor_name(self, graph: str, node: fx.Node) -> str:
        """The canonical name of the tensor that a get_attr node reads."""
        target = str(node.target)
        return self.canonical.get(target) or f"{graph}:{target}"


def shapes_of(module: fx.GraphModule) -> dict[fx.Node, Shape]:
    """The shape of every node, symbols replaced by primes: one for all that have the same size in the example.

    What leads two inputs is mostly one batch, even where nothing in the graph compares them.
    """
    primes: dict[Any, int] = {}
    sizes: dict[Any, int] = {}

    def number(extent: Any) -> int:
        if isinstance(extent, int):
            return extent
        expr = extent.node.expr
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in primes:
                example = extent.node.hint if expr == symbol else None
                key = symbol if example is None else example
                primes[symbol] = sizes.setdefault(key, PRIMES[len(sizes) % len(PRIMES)])
        return int(expr.xreplace(primes))

    def shape(value: Any) -> Shape:
        if isinstance(value, Tensor):
            return tuple(number(extent) for extent in value.shape)
        if isinstance(value, list | tuple):
            return tuple(shape(item) for item in value)  # pyright: ignore[reportUnknownVariableType]  fake values
        return None

    found: dict[fx.Node, Shape] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            attribute = fetch(module, str(node.target))
            found[node] = tuple(attribute.shape) if isinstance(attribute, Tensor) else None
        else:
            found[node] = shape(node.meta.get("val"))
    return found


def _from_input(graph: fx.Graph) -> dict[fx.Node, bool]:
    out: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        out[node] = node.op == "placeholder" or any(out[operand] for operand in node.all_input_nodes)
    return out


def check_captured(module: fx.GraphModule, who: str) -> None:
    """Raise `PassError` where a node lacks what capture records."""
    for node in module.graph.nodes:
        if node.op in ("call_module", "call_method") or (node.op == "call_function" and "val" not in node.meta):
            raise PassError(
                f"{who}: node {node.name!r} ({node.op} {node.target}) is not a captured ATen call; "
                "run the pass Normalize first, or make the graph with gpd_fx.capture(model, example_inputs)"
            )


def names_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Each name -> the first name of the same tensor, so that tied tensors stay tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def analyse(
    graphs: Mapping[str, fx.GraphModule],
    canonical: Mapping[str, str] | None = None,
) -> Analysis:
    """Propagate axes through all graphs of one model to a fixpoint.

    Args:
        graphs: captures of the same model, by any names.
        canonical: for every name of a shared parameter or buffer, the name it goes by; by default taken from the first
            graph. Tensors not named there (constants that capture lifted) belong to their graph alone.
    """
    solver = AxisSolver()
    if canonical is None:
        module = next(iter(graphs.values()))
        canonical = names_of(
            [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        )
    result = Analysis(solver, {}, {}, dict(canonical), {})
    for key, module in graphs.items():
        facts = Facts(module, shapes_of(module), _from_input(module.graph))
        result.graphs[key] = facts
        for node in module.graph.nodes:
            tensor = fetch(module, str(node.target)) if node.op == "get_attr" else None
            if isinstance(tensor, Tensor):
                name = result.tensor_name(key, node)
                if name not in result.tensors:
                    result.tensors[name] = [solver.fresh(n, f"{name}[{d}]") for d, n in enumerate(tensor.shape)]
                if isinstance(tensor, torch.nn.Parameter):
                    result.parameters.setdefault(name, tensor)
    created: dict[tuple[fx.Node, int], Expr] = {}
    before = -1
    while before != solver.version:
        before = solver.version
        result.sweeps += 1
        result.equal, result.shunned, result.faults = [], [], []
        for key, facts in result.graphs.items():
            _sweep(result, key, facts, created)
        if result.sweeps > _MAX_SWEEPS:
            raise PassError(f"axis propagation did not settle in {_MAX_SWEEPS} sweeps; please report this model")
    return result


def _sweep(result: Analysis, key: str, facts: Facts, created: dict[tuple[fx.Node, int], Expr]) -> None:
    solver, values = result.solver, facts.values
    for node in facts.module.graph.nodes:
        if node.op == "placeholder":
            values[node] = frozen_value(facts.shapes[node])
        elif node.op == "get_attr":
            shaped = facts.shapes[node] is not None
            values[node] = result.tensors[result.tensor_name(key, node)] if shaped else None
        elif node.op == "output":
            for operand in node.all_input_nodes:
                reason = Reason("output", operand.name, "it is an output of the model")
                freeze_value(solver, values[operand], reason)
        elif node.target is operator.getitem:
            source = values[node.args[0]]
            values[node] = source[node.args[1]] if isinstance(source, tuple) else None
        else:
            values[node] = _apply(result, facts, node, created)


def _apply(result: Analysis, facts: Facts, node: fx.Node, created: dict[tuple[fx.Node, int], Expr]) -> Value:
    site = Site(node, result.solver, facts.values, facts.shapes, facts.from_input, created)
    facts.effects[node] = []
    rule = rule_of(node.target)
    if rule is None:
        return site.freeze_all("this op has no rule")
    result.solver.at(site.reason("axes that meet here cannot all be widened alike"))
    try:
        value = rule(site)
        _check(value, facts.shapes[node])
    except Exception as error:  # noqa: BLE001  a faulty rule must cost width, never correctness
        reason = site.reason(f"its rule failed ({type(error).__name__}: {error})")
        result.faults.append(reason)
        return site.freeze_all(reason.text)
    facts.effects[node] = site.effects
    result.equal += [(axis, site.reason(text)) for axis, text in site.equal]
    result.shunned += site.shunned
    return value


def _check(value: Value, shape: Shape) -> None:
    if value is None or shape is None:
        return
    if isinstance(value, tuple):
        for item, item_shape in zip(value, shape, strict=True):
            assert not isinstance(item_shape, int)
            _check(item, item_shape)
    elif tuple(map(size, value)) != shape:
        raise ValueError(f"axes {list(map(size, value))} for a result of shape {list(shape)}")
