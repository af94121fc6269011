"""What a rule sees of a node: arguments by name, axes and shapes of its operands, and where it states effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx

from gpd_fx.axes.expressions import Expr, Reason, frozen
from gpd_fx.axes.solver import AxisSolver
from gpd_fx.fxtools.node_arguments import bind, op_name
from gpd_fx.fxtools.torch_internals import OpOverload, schema

if TYPE_CHECKING:
    from gpd_fx.rules.effects import Effect

Axes: TypeAlias = list[Expr]
Value: TypeAlias = Axes | tuple["Value", ...] | None  # a tensor's axes; several results; not a tensor
Shape: TypeAlias = tuple[int, ...] | tuple["Shape", ...] | None
Rule: TypeAlias = Callable[["Site"], Value]


class Site:
    """One node under analysis. Rules unify and freeze axes through `solver` and append to `effects` and `equal`."""

    def __init__(
        self,
        node: fx.Node,
        solver: AxisSolver,
        values: Mapping[fx.Node, Value],
        shapes: Mapping[fx.Node, Shape],
        from_input: Mapping[fx.Node, bool],
        created: dict[tuple[fx.Node, int], Expr],
    ) -> None:
        self.node = node
        self.solver = solver
        self.created = created  # axes that nodes create, the same in every sweep
        self.effects: list[Effect] = []
        self.equal: list[tuple[Expr, str]] = []  # axes whose elements need equally many copies, and what for
        self.shunned: list[Expr] = []  # axes that rather stay as they are (contracted by two activations)
        self._values = values
        self._shapes = shapes
        self._from_input = from_input
        self._args: dict[str, Any] | None = None

    @property
    def op(self) -> str:
        """The node's op, as reports name it."""
        return op_name(self.node.target)

    @property
    def schema(self) -> torch.FunctionSchema:
        """The schema of the node's ATen overload."""
        assert isinstance(self.node.target, OpOverload)
        return schema(self.node.target)

    def arg(self, name: str) -> Any:
        """The value of an argument of the op by its schema name, default included."""
        if self._args is None:
            self._args = bind(self.node)
        return self._args[name]

    def has_arg(self, name: str) -> bool:
        """Whether the op's schema has an argument of that name."""
        return any(argument.name == name for argument in self.schema.arguments)

    def tensors(self) -> list[fx.Node | None]:
        """The op's tensor arguments in schema order; None for one that is not given."""
        found: list[fx.Node | None] = []
        for argument in self.schema.arguments:
            if str(argument.type) in ("Tensor", "Optional[Tensor]"):
                value = self.arg(argument.name)
                found.append(value if isinstance(value, fx.Node) else None)
        return found

    def axes(self, node: fx.Node) -> Axes:
        """The resolved axes of a tensor-valued node."""
        value = self._values[node]
        assert isinstance(value, list), f"{node} is not a tensor"
        return [self.solver.resolve(axis) for axis in value]

    def value(self, node: fx.Node) -> Value:
        """The axes of a node, of whatever kind."""
        return self._values.get(node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """A tensor-valued node's shape; symbolic sizes stand as large primes."""
        shape = self._shapes[node]
        assert isinstance(shape, tuple)
        return shape  # pyright: ignore[reportReturnType]  a tensor's shape holds only ints

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of this node's result (of the first where there are several)."""
        shape = self._shapes[self.node]
        assert isinstance(shape, tuple)
        if shape and isinstance(shape[0], tuple):
            shape = shape[0]
        return shape  # pyright: ignore[reportReturnType]  a tensor's shape holds only ints

    @property
    def out_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of this node's results, for an op with several."""
        return self._shapes[self.node]  # pyright: ignore[reportReturnType]  only asked for ops with several results

    def from_input(self, node: fx.Node) -> bool:
        """Whether a node's value depends on the model's inputs (an activation) or on parameters alone (a weight)."""
        return self._from_input[node]

    def symbolic(self, node: fx.Node, dim: int) -> bool:
        """Whether a tensor's size along a dimension is known only when the graph runs."""
        value = node.meta.get("val")
        size = value.shape[dim] if isinstance(value, Tensor) else None
        return isinstance(size, torch.SymInt)  # pyright: ignore[reportUnnecessaryIsInstance]  a fake tensor's

    def dim(self, dim: int, rank: int) -> int:
        """A dimension counted from the front."""
        return dim % rank if rank else 0

    def results(self, axes: Axes) -> Value:
        """The value of an op whose results all have the same axes."""
        count = len(self.schema.returns)
        return axes if count == 1 else tuple(list(axes) for _ in range(count))

    def freeze(self, axis: Expr, text: str, *, natural: bool = False) -> Expr:
        """Freeze one axis with a reason of this node."""
        return self.solver.freeze(axis, self.reason(text, natural=natural))

    def reason(self, text: str, *, natural: bool = False) -> Reason:
        """A reason that names this node."""
        return Reason(self.op, self.node.name, text, natural)

    def freeze_all(self, text: str) -> Value:
        """Freeze every axis of every operand; the op then sees exactly what it sees in the model."""
        for operand in self.node.all_input_nodes:
            freeze_value(self.solver, self.value(operand), self.reason(text))
        return frozen_value(self._shapes.get(self.node))


def freeze_value(solver: AxisSolver, value: Value, reason: Reason) -> None:
    """Freeze all axes of a value."""
    if isinstance(value, tuple):
        for item in value:
            freeze_value(solver, item, reason)
    elif value is not None:
        for axis in value:
            solver.freeze(axis, reason)


def frozen_value(shape: Shape) -> Value:
    """Frozen axes of a given shape."""
    if shape is None:
        return None
    if any(not isinstance(item, int) for item in shape):
        return tuple(frozen_value(item) for item in shape)  # pyright: ignore[reportArgumentType]  items are shapes here
    return [frozen(item) for item in shape]  # pyright: ignore[reportArgumentType]  items are ints here
