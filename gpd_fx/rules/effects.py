"""What widening does to a node's arguments and result, beyond being given wide operands.

A rule states effects in terms of axis expressions, before anything is decided. Once copies are chosen, the widening
pass applies them; an effect whose expressions are not widened does nothing, so untouched nodes stay as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, prod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import fx

from gpd_fx.axes.expressions import Expr, size
from gpd_fx.axes.widening import Widening

if TYPE_CHECKING:
    from gpd_fx.rules.rewriter import Rewriter

aten = torch.ops.aten


class Effect(Protocol):
    """Something to do to a node once the copies are chosen."""

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        """Change `node` (in the wide graph) accordingly."""
        ...


@dataclass(frozen=True)
class Contract:
    """Multiply an operand by alpha along its contracted axes.

    `dims` gives for each dimension of the operand its factors, each with whether it is contracted.
    """

    arg: str
    dims: tuple[tuple[tuple[Expr, bool], ...], ...]

    def vectors(self, widening: Widening) -> list[torch.Tensor | None]:
        """Per dimension the float64 factors [wide size], or None where there are none."""
        out: list[torch.Tensor | None] = []
        for factors in self.dims:
            if not any(hit and widening.widens(expr) for expr, hit in factors):
                out.append(None)
                continue
            vector = torch.ones(1, dtype=torch.float64)
            for expr, hit in factors:
                share = widening.alpha(expr) if hit else torch.ones(widening.size(expr), dtype=torch.float64)
                vector = (vector[:, None] * share).flatten()
            out.append(vector)
        return out

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        rewriter.scale_operand(node, self.arg, self.vectors(rewriter.widening))


@dataclass(frozen=True)
class Extent:
    """An integer argument is the size of an axis."""

    arg: str
    expr: Expr

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        if rewriter.widening.widens(self.expr):
            rewriter.set_arg(node, self.arg, rewriter.widening.size(self.expr))


@dataclass(frozen=True)
class Extents:
    """An integer-list argument is the sizes of axes, one each; entries of axes that are not widened stay."""

    arg: str
    exprs: tuple[Expr, ...]

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        if any(map(rewriter.widening.widens, self.exprs)):
            given = rewriter.get_arg(node, self.arg)
            rewriter.set_arg(node, self.arg, [rewriter.extent(g, e) for g, e in zip(given, self.exprs, strict=True)])


@dataclass(frozen=True)
class Bounds:
    """A slice takes `inside` out of an axis, from between `before` and `behind`; it is given by `end` or `length`."""

    before: Expr
    inside: Expr
    behind: Expr
    end: bool = True

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        if any(map(rewriter.widening.widens, (self.before, self.inside, self.behind))):
            start, length = rewriter.widening.size(self.before), rewriter.widening.size(self.inside)
            rewriter.set_arg(node, "start", start)
            rewriter.set_arg(node, "end" if self.end else "length", start + length if self.end else length)


@dataclass(frozen=True)
class Pieces:
    """A splitting op yields pieces of the given axes."""

    exprs: tuple[Expr, ...]
    dim: int

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        if any(map(rewriter.widening.widens, self.exprs)):
            sizes = [rewriter.widening.size(expr) for expr in self.exprs]
            node.target = aten.split_with_sizes.default
            node.args, node.kwargs = (node.args[0], sizes, self.dim), {}


@dataclass(frozen=True)
class Linear:
    """The op sums (`mean=False`) or averages its operand over `exprs`, or takes their p-norm: keep the value.

    With the share s for every copy the result is scaled by s**(1/p), otherwise the operand by its shares beforehand.
    """

    arg: str
    dims: tuple[Expr | None, ...]  # per dimension of the operand, the axis if it is reduced
    mean: bool = False
    p: float = 1.0

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        widening = rewriter.widening
        vectors: list[torch.Tensor | None] = []
        scale = 1.0
        for expr in self.dims:
            if expr is None or not widening.widens(expr):
                vectors.append(None)
                continue
            share = widening.even(expr)
            if bool((share == share[0]).all()):
                vectors.append(None)
                scale *= 1.0 if self.mean else float(share[0]) ** (1 / self.p)
            else:
                vectors.append(share * (len(share) / size(expr)) if self.mean else share ** (1 / self.p))
        rewriter.scale_operand(node, self.arg, vectors)
        rewriter.after(node, aten.mul.Tensor, scale)


@dataclass(frozen=True)
class Shared:
    """The op takes p-norms along `dims`, of this operand or of its product with others: it goes in times alpha**(1/p).

    With `back` the result, which has the operand's dimensions, is divided by the same factors.
    """

    arg: str
    dims: tuple[Expr | None, ...]  # as in `Linear`
    p: float = 2.0
    back: bool = False

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        widening = rewriter.widening
        hit = [expr if expr is not None and widening.widens(expr) else None for expr in self.dims]
        vectors = [None if expr is None else widening.alpha(expr) ** (1 / self.p) for expr in hit]
        rewriter.scale_operand(node, self.arg, vectors)
        if self.back:
            rewriter.scale_result(node, [None if vector is None else 1 / vector for vector in vectors])


@dataclass(frozen=True)
class Softmax:
    """The op normalises over axes of equal multiplicity m: its result is m times too small (or log m, with `log`)."""

    exprs: tuple[Expr, ...]
    log: bool = False
    sign: int = 1

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        count = _copies(rewriter.widening, self.exprs)
        if self.log:
            rewriter.after(node, aten.add.Tensor, self.sign * log(count))
        else:
            rewriter.after(node, aten.mul.Tensor, float(count))


@dataclass(frozen=True)
class Variance:
    """A variance with a correction c: of m copies it takes m·c, since SS / (n - c) = m·SS / (m·n - m·c)."""

    exprs: tuple[Expr, ...]
    correction: int | float

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        count = _copies(rewriter.widening, self.exprs)
        if count > 1 and self.correction:
            rewriter.set_correction(node, count * self.correction)


def _copies(widening: Widening, exprs: tuple[Expr, ...]) -> int:
    """How many copies each element of a product of axes has, where the rule asked that they be equally many."""
    counts = [widening.multiplicity(expr) for expr in exprs]
    assert None not in counts, "the plan broke a constraint of equal multiplicities"
    return prod(count for count in counts if count is not None)


@dataclass(frozen=True)
class Fixed:
    """An argument whose default depends on a size is given as the value that it has in the model."""

    arg: str
    value: float
    expr: Expr

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        if rewriter.widening.widens(self.expr) and rewriter.get_arg(node, self.arg) is None:
            rewriter.set_arg(node, self.arg, self.value)


@dataclass(frozen=True)
class SymbolicSize:
    """The node reads a size of a tensor: everything downstream expects the model's."""

    expr: Expr

    def apply(self, rewriter: Rewriter, node: fx.Node) -> None:
        rewriter.unscale_size(node, self.expr)
