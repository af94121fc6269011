"""The tools with which effects change a node of the wide graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor, fx

from gpd_fx.axes.expressions import Expr, size
from gpd_fx.axes.widening import Widening
from gpd_fx.fxtools.node_arguments import bind, op_name, set_arg

aten = torch.ops.aten


class Rewriter:
    """Edits nodes of one graph.

    `constant(value, like)` registers a float64 tensor, in the dtype and on the device of `like`, and returns its name.
    `absorbed` are the operands (node, argument) whose alpha the stored parameter takes instead of the graph.
    """

    def __init__(
        self,
        graph: fx.Graph,
        widening: Widening,
        constant: Callable[[Tensor, Tensor], str],
        absorbed: set[tuple[str, str]],
    ) -> None:
        self.graph = graph
        self.widening = widening
        self._constant = constant
        self._absorbed = absorbed

    def get_arg(self, node: fx.Node, name: str) -> Any:
        """An argument by schema name, default included; `name.k` is element k of a list argument."""
        name, _, index = name.partition(".")
        value = bind(node)[name]
        return value[int(index)] if index else value

    def set_arg(self, node: fx.Node, name: str, value: Any) -> None:
        """Set an argument by schema name, or `name.k`."""
        name, _, index = name.partition(".")
        if index:
            value = [value if k == int(index) else item for k, item in enumerate(bind(node)[name])]
        set_arg(node, name, value)

    def set_correction(self, node: fx.Node, value: float) -> None:
        """Set the correction of var, std, var_mean or std_mean, whichever overload it is."""
        given = bind(node)
        node.target = getattr(aten, op_name(node.target).split(".")[1]).correction
        node.args = (given["self"], given.get("dim"))
        node.kwargs = {"correction": value, "keepdim": given.get("keepdim", False)}

    def extent(self, given: Any, expr: Expr) -> Any:
        """The wide size of an axis whose size argument was `given`: an int, a node that computes it, or -1."""
        if not self.widening.widens(expr) or (isinstance(given, int) and given == -1):
            return given
        if isinstance(given, int):
            return self.widening.size(expr)
        return self._ratio(given, self.widening.size(expr), size(expr))

    def unscale_size(self, node: fx.Node, expr: Expr) -> None:
        """Let users of a size-reading node see the size that the axis has in the model."""
        if self.widening.widens(expr):
            users = list(node.users)
            with self.graph.inserting_after(node):
                self._replace(node, self._ratio(node, size(expr), self.widening.size(expr)), users)

    def _ratio(self, value: fx.Node, up: int, down: int) -> fx.Node:
        common = gcd(up, down)
        with self.graph.inserting_after(value):
            product = self.graph.call_function(operator.mul, (value, up // common))
        with self.graph.inserting_after(product):
            return self.graph.call_function(operator.floordiv, (product, down // common))

    def scale_operand(self, node: fx.Node, arg: str, vectors: Sequence[Tensor | None]) -> None:
        """Multiply an operand along its dimensions, right where `node` uses it."""
        if all(vector is None for vector in vectors) or (node.name, arg) in self._absorbed:
            return
        with self.graph.inserting_before(node):
            scaled = self._times(self.get_arg(node, arg), vectors)
        self.set_arg(node, arg, scaled)

    def scale_result(self, node: fx.Node, vectors: Sequence[Tensor | None]) -> None:
        """Multiply a node's result along its dimensions."""
        if any(vector is not None for vector in vectors):
            users = list(node.users)
            with self.graph.inserting_before(node.next):
                result = self._times(node, vectors)
            self._replace(node, result, users)

    def _times(self, operand: fx.Node, vectors: Sequence[Tensor | None]) -> fx.Node:
        value, scaled = operand.meta["val"], operand
        for dim, vector in enumerate(vectors):
            if vector is not None:
                shaped = vector.reshape([-1 if d == dim else 1 for d in range(len(vectors))])
                factor = self.graph.get_attr(self._constant(shaped, value))
                scaled = self.graph.call_function(aten.mul.Tensor, (scaled, factor))
                scaled.meta["val"] = value  # for its dtype and device
        return scaled

    def after(self, node: fx.Node, op: Callable[..., Any], value: float) -> None:
        """Put `op(result, value)` in the place of the node's result, unless that would change nothing."""
        if value == (0.0 if op is aten.add.Tensor else 1.0):
            return
        users = list(node.users)
        with self.graph.inserting_after(node):
            result = self.graph.call_function(op, (node, value))
        result.meta["val"] = node.meta["val"]  # for its dtype and device
        self._replace(node, result, users)

    def _replace(self, node: fx.Node, by: fx.Node, users: Sequence[fx.Node]) -> None:
        for user in users:
            user.replace_input_with(node, by)
