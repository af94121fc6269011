"""Axis expressions: which channels of which tensors are the same channels.

An axis of a tensor is an expression over *atoms*. An `Expr` is a row-major product of factors, outermost first:

    int     a frozen extent; its elements are never copied
    Atom    an extent that may be widened
    Cat     a concatenation of expressions

`()` is the axis of size one. Atoms live in a union-find whose links are refinements: an atom may turn out to be another
atom (residual sum), a product (reshape, convolution groups) or a concatenation (cat, split), and it is that everywhere
it occurs. A frozen atom is one that is refined to its size. Every operation of `AxisSolver` only adds knowledge, so the
analysis of a graph terminates. Whatever two expressions cannot agree on is frozen, which is always right: a frozen
extent stays as it is in the model.

The idea follows the sharding propagation of OpenXLA Shardy (docs/propagation.md there).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TypeAlias


class Atom:
    """An extent of at least two elements that may be widened. Identity is what matters."""

    __slots__ = ("definition", "joined", "label", "reason", "resolved", "size", "step")

    def __init__(self, size: int, label: str) -> None:
        self.size = size
        self.label = label
        self.definition: Expr | None = None  # as it was first refined; the chain tells the story to the report
        self.resolved: Expr | None = None  # the same, path-compressed
        self.reason: Reason | None = None  # why it is frozen
        self.joined: Reason | None = None  # where it was first refined
        self.step = 0  # when: how many refinements there were by then

    def __repr__(self) -> str:
        return f"{self.label}:{self.size}"


@dataclass(frozen=True)
class Cat:
    """A concatenation of at least two expressions, first to last."""

    parts: tuple[Expr, ...]

    def __repr__(self) -> str:
        return "[" + " + ".join(map(show, self.parts)) + "]"


Factor: TypeAlias = int | Atom | Cat
Expr: TypeAlias = tuple[Factor, ...]
SCALAR: Expr = ()


@dataclass(frozen=True)
class Reason:
    """Why channels stay unwidened: the op, the node it occurred at, and what it could not follow.

    `natural` marks axes that nobody would widen, such as those of a convolution kernel.
    """

    op: str
    node: str
    text: str
    natural: bool = False


def size(expr: Expr) -> int:
    """Number of elements along `expr`."""
    return prod(f if isinstance(f, int) else f.size if isinstance(f, Atom) else sum(map(size, f.parts)) for f in expr)


def is_frozen(expr: Expr) -> bool:
    """Whether a resolved `expr` holds no atom."""
    return not expr or (len(expr) == 1 and isinstance(expr[0], int))


def atoms(expr: Expr) -> Iterator[Atom]:
    """The atoms of `expr`, in order, repeated as they occur."""
    for factor in expr:
        if isinstance(factor, Atom):
            yield factor
        elif isinstance(factor, Cat):
            for part in factor.parts:
                yield from atoms(part)


def show(expr: Expr) -> str:
    """`expr` for a reader."""
    return "·".join(map(repr, expr)) or "1"


def frozen(extent: int) -> Expr:
    """The frozen axis of `extent` elements."""
    return () if extent == 1 else (extent,)


def product(exprs: Iterable[Expr]) -> Expr:
    """Row-major product, outermost first; neighbouring frozen factors are joined."""
    out: list[Factor] = []
    for expr in exprs:
        for factor in expr:
            if isinstance(factor, int) and out and isinstance(out[-1], int):
                out[-1] *= factor
            elif factor != 1:
                out.append(factor)
    return tuple(out)


def concat(exprs: Iterable[Expr]) -> Expr:
    """Concatenation; nested ones are flattened, neighbouring frozen parts are joined, empty ones dropped."""
    out: list[Expr] = []
    for expr in exprs:
        head = expr[0] if len(expr) == 1 else None
        for part in head.parts if isinstance(head, Cat) else (expr,):
            if size(part) == 0:
                continue
            if out and is_frozen(part) and is_frozen(out[-1]):
                out[-1] = frozen(size(out[-1]) + size(part))
            else:
                out.append(part)
    if not out:
        return frozen(0)
    return out[0] if len(out) == 1 else (Cat(tuple(out)),)


def parts(expr: Expr) -> list[Expr]:
    """The products without concatenations that the elements of `expr` belong to, in any order."""
    products: list[Expr] = [()]
    for factor in expr:
        terms = [term for part in factor.parts for term in parts(part)] if isinstance(factor, Cat) else [(factor,)]
        products = [product((head, term)) for head in products for term in terms]
    return products


def pieces(expr: Expr) -> list[Expr]:
    """`expr` as a concatenation, first to last: an outermost `Cat` is distributed over the factors behind it."""
    if expr and isinstance(expr[0], Cat):
        return [product((part, expr[1:])) for part in expr[0].parts]
    return [expr]


def reasons(atom: Atom) -> Iterator[Reason]:
    """Why parts of what `atom` turned out to be are frozen."""
    if atom.reason is not None:
        yield atom.reason
    for part in atoms(atom.definition or ()):
        yield from reasons(part)


def joint(a: Expr, b: Expr, atom: Atom) -> Atom | None:
    """The atom whose refinement gave two axes, as they were at first, `atom` in common; None if they always had it.

    Refinements are the links of a forest. The last of those that lead from either axis to where they first meet is
    the one that joined them.
    """
    way, other = _way(a, atom), _way(b, atom)
    met = set(way).intersection(other)
    before = [one for one in (*way, *other) if one not in met]
    return max(before, key=lambda one: one.step, default=None)


def _way(expr: Expr, atom: Atom) -> list[Atom]:
    """The atoms that a refinement of `expr` passes until it comes to `atom`, that one included; else none."""
    came_from: dict[Atom, Atom | None] = dict.fromkeys(atoms(expr))
    waiting = list(came_from)
    for head in waiting:  # grows
        if head is atom:
            break
        for part in atoms(head.definition or ()):
            if part not in came_from:
                came_from[part] = head
                waiting.append(part)
    way: list[Atom] = []
    step = atom if atom in came_from else None
    while step is not None:
        way.append(step)
        step = came_from[step]
    return way
