"""What a picture of the expansion shows: the ops of a graph, what became of their channels, collapsed by module.

`trace` takes down a plan's graph as a short list of `Op`s, which a report keeps. `boxes` makes of it what is drawn:
each op alone, or the ops of each module at some depth together. Ops of one box follow one another in the graph, so
boxes form no cycle, and a module that is called twice is two boxes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import fx

from gpd_fx.axes.expressions import Atom, Cat, Expr
from gpd_fx.fxtools.name_patterns import pattern, span
from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.plan.analysis import PRIMES, Facts
from gpd_fx.plan.plan import Plan
from gpd_fx.rules.site import Value

T = TypeVar("T")
OPS = 80  # a graph with more ops is drawn by modules
BOXES = 60  # as deep as there are no more boxes than that,
FEW = 12  # or one level deeper, several modules to a box, where there would be fewer than that

STATES = {
    "widened": "widened: its channels are copied",
    "closes": "takes widened channels in, gives none out",
    "partly": "partly: some of its channels or parameters are widened",
    "mixed": "mixed: a module of widened and frozen ops",
    "frozen": "frozen: as in the student",
    "plain": "not reached by any parameter",
}


class Stop(Protocol):
    """Where and why channels stay; `gpd_fx.report.FrozenAxis` is one."""

    @property
    def op(self) -> str: ...
    @property
    def node(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def channels(self) -> tuple[str, ...]: ...
    @property
    def cost(self) -> int: ...


@dataclass(frozen=True)
class Op:
    """A node of the captured graph.

    Attributes:
        name: the node's.
        op: what it calls.
        module: path of the module that it is in.
        state: a key of `STATES`, but for "mixed".
        shape: of its result; `64→128` where it is widened.
        inputs: indices of the ops that it takes results of.
        parameters: how many the student has that are first used here.
        stops: whether parameters go unwidened because of this op.
        reasons: why it, or parameters that it uses, are not widened: each with the op and node that hold them.
    """

    name: str
    op: str
    module: str
    state: str
    shape: str
    inputs: tuple[int, ...]
    parameters: int = 0
    stops: bool = False
    reasons: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Box:
    """One or more ops, as drawn. `edges`: box that it takes a result of -> state of that result."""

    title: str
    lines: tuple[str, ...]
    state: str
    edges: Mapping[int, str]
    stops: bool
    reasons: tuple[str, ...]


# ------------------------------------------------------------------------------------------------ what is in the graph


def trace(plan: Plan, stops: Sequence[Stop]) -> tuple[Op, ...]:
    """The ops of a plan's graph in eval mode, or of the first there is. `stops`: why channels stay."""
    graphs = plan.analysis.graphs
    key = "eval" if "eval" in graphs else next(iter(graphs))
    facts = graphs[key]
    at: dict[tuple[str, str], list[Stop]] = {}
    because: dict[str, Stop] = {}
    for stop in stops:
        at.setdefault((stop.op, stop.node), []).append(stop)
        because |= dict.fromkeys((name for name in stop.channels if not name.endswith("]")), stop)
    found: list[Op] = []
    place: dict[fx.Node, int] = {}
    follows: set[fx.Node] = set()  # nodes whose value depends on a parameter
    used: set[str] = set()
    for node in facts.module.graph.nodes:
        names = [plan.analysis.tensor_name(key, n) for n in node.all_input_nodes if n.op == "get_attr"]
        names = [name for name in names if name in plan.analysis.parameters]
        if names or not follows.isdisjoint(node.all_input_nodes):
            follows.add(node)
        if node.target is operator.getitem and node.args[0] in place:
            place[node] = place[node.args[0]]
        elif node.op == "output" or (node.op != "get_attr" and facts.shapes[node] is not None and node.users):
            place[node] = len(found)
            here = [*at.get((op_name(node.target), node.name), ()), *at.get(("output", node.name), ())]
            held = [because[name] for name in names if name in because]
            state = _state(plan, facts, node, node in follows)
            if state == "widened" and any(stop.op != "-" for stop in held):
                state = "partly"
            mine = [*(stop for stop in here if stop.cost), *held] or (here if state != "widened" else [])
            inputs = dict.fromkeys(place[operand] for operand in node.all_input_nodes if operand in place)
            fresh = [plan.analysis.parameters[name].numel() for name in dict.fromkeys(names) if name not in used]
            used.update(names)
            found.append(
                Op(
                    node.name,
                    _called(node),
                    _module(node),
                    state,
                    _shown(plan, facts, node),
                    tuple(inputs),
                    sum(fresh),
                    any(stop.cost for stop in here if stop.op != "output"),
                    tuple(dict.fromkeys((stop.reason, _where(stop)) for stop in mine)),
                )
            )
    return tuple(found)


def _called(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    return op_name(node.target).removeprefix("aten.").removesuffix(".default")


def _where(stop: Stop) -> str:
    """The op that holds channels, as a reader of the picture finds it; empty for what is no op."""
    if stop.op in ("-", "exclude", "ratio", "product"):
        return ""
    return stop.node if stop.op == "output" else f"{stop.op} at {stop.node}"


def _module(node: fx.Node) -> str:
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _axes(value: Value) -> Iterable[Expr]:
    if isinstance(value, tuple):
        for item in value:
            yield from _axes(item)
    else:
        yield from value or ()


def _state(plan: Plan, facts: Facts, node: fx.Node, follows: bool) -> str:
    operands = [facts.values.get(operand) for operand in node.all_input_nodes]
    if node.op == "output":
        return "plain"
    wide = [axis for axis in _axes(facts.values.get(node)) if plan.widening.widens(axis)]
    if wide:
        resolve = plan.analysis.solver.resolve
        return "widened" if all(_all_wide(plan, resolve(axis)) for axis in wide) else "partly"
    if any(plan.widening.widens(axis) for value in operands for axis in _axes(value)):
        return "closes"
    return "frozen" if follows else "plain"


def _all_wide(plan: Plan, expr: Expr) -> bool:
    return any(
        (isinstance(f, Atom) and f in plan.widening.copies)
        or (isinstance(f, Cat) and all(_all_wide(plan, part) for part in f.parts))
        for f in expr
    )


def _shown(plan: Plan, facts: Facts, node: fx.Node) -> str:
    shape, value = facts.shapes[node], facts.values.get(node)
    if node.op == "output" or shape is None:
        return ""
    several = [(k, item) for k, item in enumerate(shape) if isinstance(item, tuple)]
    if several:  # the first of several results
        k, shape = several[0]
        value = value[k] if isinstance(value, tuple) else None
    sizes = [extent for extent in shape if isinstance(extent, int)]
    axes: Sequence[Expr | None] = value if isinstance(value, list) else [None] * len(sizes)
    more = f" and {len(several) - 1} more" if len(several) > 1 else ""
    return " × ".join(_extent(plan, *pair) for pair in zip(sizes, axes, strict=True)) + more


def _extent(plan: Plan, extent: int, axis: Expr | None) -> str:
    batch = next((prime for prime in PRIMES if extent % prime == 0), 1)
    factor = "" if batch == 1 else "N" if extent == batch else f"{extent // batch}N"
    if axis is None or not plan.widening.widens(axis):
        return factor or str(extent)
    wide = plan.widening.size(axis)
    return f"{extent // batch}N→{wide // batch}N" if factor else f"{extent}→{wide}"


# --------------------------------------------------------------------------------------------------- what is drawn


def boxes(ops: Sequence[Op], depth: int | None = None) -> tuple[Box, ...]:
    """What to draw.

    Args:
        ops: of a report.
        depth: how many levels of modules to open; beyond the deepest every op is a box. None opens as many as can be
            read on one page.
    """
    groups, depth = _opened(ops) if depth is None else (_runs(ops, depth), depth)
    home = {index: k for k, group in enumerate(groups) for index in group}
    out: list[Box] = []
    for k, group in enumerate(groups):
        edges: dict[int, str] = {}
        for index in group:
            for operand in ops[index].inputs:
                wide = ops[operand].state in ("widened", "partly")
                if home[operand] != k and (wide or home[operand] not in edges):
                    edges[home[operand]] = ops[operand].state
        out.append(_box([ops[index] for index in group], depth, edges))
    return tuple(out)


def _opened(ops: Sequence[Op]) -> tuple[list[list[int]], int]:
    """Ops by box, as deep as can be read, and how deep that is."""
    deepest = max((op.module.count(".") + 1 for op in ops if op.module), default=0)
    if len(ops) <= OPS:
        return _runs(ops, deepest + 1), deepest + 1
    depth = 1
    while depth < deepest and (len(_runs(ops, depth + 1)) <= BOXES or len(_runs(ops, depth)) < FEW):
        depth += 1
    long = max(10, -(-len(ops) // BOXES))  # ops without modules between them
    groups = [
        part for group in _runs(ops, depth) for part in (_chunks(group, long) if _direct(ops, group) else [group])
    ]
    together = -(-len(groups) // BOXES)
    return [[index for group in chunk for index in group] for chunk in _chunks(groups, together)], depth


def _chunks(items: Sequence[T], length: int) -> list[list[T]]:
    return [list(items[i : i + length]) for i in range(0, len(items), length)]


def _direct(ops: Sequence[Op], group: Sequence[int]) -> bool:
    return len({ops[index].module for index in group}) == 1


def _runs(ops: Sequence[Op], depth: int) -> list[list[int]]:
    """Ops that follow one another within one module at `depth`."""
    deepest = max((op.module.count(".") + 1 for op in ops if op.module), default=0)
    found: list[list[int]] = []
    last: object = None
    for index, op in enumerate(ops):
        alone = depth > deepest or op.op in ("input", "output")
        key = (index,) if alone else tuple(op.module.split(".")[:depth])
        if key != last:
            found.append([])
        found[-1].append(index)
        last = key
    return found


def _box(ops: Sequence[Op], depth: int, edges: Mapping[int, str]) -> Box:
    first = ops[0]
    if len(ops) == 1:
        title, lines = first.module or first.name, [f"{first.op} · {first.shape}" if first.module else first.shape]
    else:
        counts = Counter(op.op for op in ops)
        many = ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in counts.items())
        what = many if len(counts) <= 3 and len({op.module for op in ops}) == 1 else f"{len(ops)} ops"
        title = _title([op.module for op in ops], depth) or what
        parameters = sum(op.parameters for op in ops)
        about = [what] * (title != what) + [f"{parameters:,} parameters"] * (parameters > 0)
        lines = [", ".join(about), ops[-1].shape]
    lines = [line for line in lines if line]
    own = first.name if len(ops) == 1 else ""
    reasons = dict.fromkeys(
        text if not where or f" {where}".endswith(f" {own}") else f"{text} ({where})"
        for op in ops
        for text, where in op.reasons
    )
    return Box(
        title, tuple(lines), _together([op.state for op in ops]), edges, any(op.stops for op in ops), tuple(reasons)
    )


def _title(paths: Sequence[str], depth: int) -> str:
    """The module around several ops, or all modules at `depth` that are in one box."""
    modules = list(dict.fromkeys(".".join(path.split(".")[:depth]) for path in paths))
    if len(modules) == 1 or depth == 0:
        return _common(paths)
    alike = len({pattern(module) for module in modules}) == 1
    return span(modules) if alike else f"{modules[0] or 'ops'} … {modules[-1] or 'ops'}"


def _common(paths: Sequence[str]) -> str:
    shared: list[str] = []
    for level in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _together(states: Iterable[str]) -> str:
    found = set(states) - {"plain"} or {"plain"}
    if "frozen" in found and len(found) > 1:
        return "mixed"
    return next(state for state in ("partly", "widened", "closes", "frozen", "plain") if state in found)
