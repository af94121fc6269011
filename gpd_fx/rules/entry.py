"""What the table says of an op: its rule, and all else that follows from which op it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx

from gpd_fx.axes.expressions import Expr
from gpd_fx.fxtools.node_arguments import bind, set_arg
from gpd_fx.fxtools.torch_internals import OpOverload
from gpd_fx.rules.site import Axes, Rule, Site, Value


@dataclass(frozen=True)
class Kernel:
    """How an op uses an argument as the kernel of a conv or linear layer.

    Attributes:
        argument: its name in the schema.
        transposed: whether inputs come before outputs in it.
        groups: the argument that holds the number of groups; None for an op without groups.
        numeric: the form of the op that takes its padding as numbers; None for an op without padding.
    """

    argument: str = "weight"
    transposed: bool = False
    groups: str | None = None
    numeric: OpOverload | None = None


@dataclass(frozen=True)
class Randomness:
    """How an op that draws random numbers is kept from it.

    Attributes:
        off: arguments, each of which switches it off by this value.
        ones: an op that takes its place and makes ones of its first argument's shape, for an op that has no such
            argument.
    """

    off: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ones: OpOverload | None = None

    def is_off(self, node: fx.Node) -> bool:
        """Whether a call of the op draws nothing."""
        given = bind(node)
        return any(given[name] == value for name, value in self.off.items() if name in given)

    def switch_off(self, node: fx.Node) -> None:
        """Keep a call of the op from drawing, in place."""
        if self.ones is not None:
            node.target, node.args, node.kwargs = self.ones, (node.args[0], 1.0), {}
            return
        for name, value in self.off.items():
            set_arg(node, name, value)


@dataclass(frozen=True)
class Operands:
    """The axes of one call: `out`, and those of each argument by name."""

    node: fx.Node
    out: Axes
    axes_of: Callable[[Any], Axes]

    def __getitem__(self, name: str) -> Axes:
        """The axes of a tensor argument; none for another argument."""
        return self.axes_of(self.arg(name))

    def arg(self, name: str) -> Any:
        """The value of an argument by its schema name, default included."""
        return bind(self.node)[name]


Work: TypeAlias = Callable[[Operands], Sequence[Sequence[Expr]]]
"""For each product that a call makes, the axes whose sizes multiply to its multiply-adds."""


@dataclass(frozen=True)
class Entry:
    """An op's entry in the table. It may stand wherever a rule may.

    Attributes:
        rule: what the op does to axes.
        kernel: how it uses a kernel, if it is a conv or linear op.
        work: its multiply-adds, if it contracts.
        random: how it is kept from drawing random numbers, if it draws any.
    """

    rule: Rule
    kernel: Kernel | None = None
    work: Work | None = None
    random: Randomness | None = None

    def __call__(self, site: Site) -> Value:
        """Apply the rule."""
        return self.rule(site)
