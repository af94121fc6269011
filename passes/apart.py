"""Run product branches beside a layer, as two ops one after the other, instead of as a part of its kernel.

    before    y = conv(x, w, b, ...)
    after     a = conv(x, w, b, ...)    z = conv(conv(x, point), kernel, None, ...)    y = a + z * scale

Linear layers likewise. `w` then has to come without these branches. The second conv has the stride, padding, dilation
and groups of the layer; a kernel of one tap leaves them to the first, which then makes fewer positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any

import torch
from torch import fx

from gpd_fx.errors import PassError
from gpd_fx.fxtools.attributes import has, with_graph
from gpd_fx.fxtools.node_arguments import bind
from gpd_fx.fxtools.torch_internals import copy_graph
from gpd_fx.passes.base import Pass, PassResult
from gpd_fx.rules.table import entry_of
from gpd_fx.rules.weights import weight_layout

aten = torch.ops.aten


@dataclass(frozen=True)
class Beside:
    """The attributes that one branch is run with: conv weights as torch stores them, and a scale of the outputs.

    Attributes:
        point: `(groups * inner, inputs of a group, 1, ...)`; a matrix for a linear layer.
        kernel: `(outputs, inner, *k)`.
        scale: `(outputs, 1, ...)`.
        taps: how many taps the kernel has.
    """

    point: str
    kernel: str
    scale: str
    taps: int

    @property
    def paths(self) -> tuple[str, str, str]:
        """Of the three attributes."""
        return self.point, self.kernel, self.scale


@dataclass(frozen=True)
class Apart(Pass):
    """Adds the branches in `products` beside every conv or linear op whose weight is the attribute they are listed for.

    The attributes that a `Beside` names have to be there, if only as None for a caller that supplies tensors at each
    call. The result shares all attributes with the given module.
    """

    products: Mapping[str, tuple[Beside, ...]] = field(default_factory=dict[str, "tuple[Beside, ...]"])

    def requires(self, module: fx.GraphModule) -> None:
        for target, products in self.products.items():
            uses = uses_of(module.graph, target)
            reasons = [reason for reason in starmap(obstacle, uses) if reason is not None]
            if reasons or not uses:
                why = reasons[0] if reasons else "no op uses it"
                raise PassError(f"Apart: the branches of {target!r} cannot run apart: {why}")
            missing = [path for product in products for path in product.paths if not has(module, path)]
            if missing:
                raise PassError(f"Apart: the module has no attribute {missing[0]!r}, which is to run beside {target!r}")

    def run(self, module: fx.GraphModule) -> PassResult:
        graph = copy_graph(module.graph)[0]
        notes: list[str] = []
        for target, products in self.products.items():
            uses = uses_of(graph, target)
            for _, node in uses:
                _add(graph, node, products)
            notes.append(f"{target}: {len(products)} branches run apart at {len(uses)} uses")
        notes = notes or ["`products` names no branch, so none was added"]
        return PassResult(with_graph(module, graph), bool(self.products), tuple(notes))

    def ensures(self, module: fx.GraphModule) -> None:
        copy_graph(module.graph)[0].lint()  # on its own: empty places are no fault


def uses_of(graph: fx.Graph, target: str) -> list[tuple[fx.Node, fx.Node]]:
    """Each use of an attribute: its node, and the node that takes it."""
    return [(node, user) for node in graph.find_nodes(op="get_attr", target=target) for user in node.users]


def obstacle(weight: fx.Node, user: fx.Node) -> str | None:
    """Why branches of an attribute cannot run beside a node that takes it; None where they can."""
    layout = weight_layout(user)
    if layout is None or layout[0] is not weight or user.all_input_nodes.count(weight) != 1:
        return f"node {user.name!r} ({user.target}) does not take it as the weight of a conv or linear op"
    return f"node {user.name!r} is a transposed conv" if layout[1].transposed else None


def _add(graph: fx.Graph, node: fx.Node, products: Sequence[Beside]) -> None:
    """Add branches to what a conv or linear node gives."""
    given = bind(node)
    users = list(node.users)
    last = node

    def then(make: Callable[..., fx.Node], *args: Any) -> fx.Node:
        nonlocal last
        with graph.inserting_after(last):
            last = make(*args)
        return last

    total = node
    entry = entry_of(node.target)
    numeric = entry.kernel.numeric if entry is not None and entry.kernel is not None else None
    for product in products:
        point, kernel, scale = (then(graph.get_attr, path) for path in product.paths)
        first = second = (node.target, {})
        if numeric is not None:
            plain = (numeric, {"groups": given["groups"]})  # without padding, and of stride 1
            whole = (node.target, {name: given[name] for name in ("stride", "padding", "dilation", "groups")})
            first, second = (whole, plain) if product.taps == 1 else (plain, whole)
        hidden = then(graph.call_function, first[0], (given["input"], point), first[1])
        result = then(graph.call_function, second[0], (hidden, kernel), second[1])
        total = then(graph.call_function, aten.addcmul.default, (total, result, scale))
    # under autocast the scale is not rounded, the sum is
    total = then(graph.call_function, aten.type_as.default, (total, node))
    for user in users:
        user.replace_input_with(node, total)
