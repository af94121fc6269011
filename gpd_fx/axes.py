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
from dataclasses import dataclass, replace
from itertools import accumulate
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


class AxisMismatchError(AssertionError):
    """Two axes that a rule calls equal have different sizes: the rule is wrong."""


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


def _pieces(expr: Expr) -> list[Expr]:
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


class AxisSolver:
    """Holds what is known of all atoms, and learns more. `version` grows with each new fact."""

    EXPAND = 16  # a frozen outer factor up to this size may be written out as a concatenation

    def __init__(self) -> None:
        self.version = 0
        self._why = Reason("?", "?", "?")

    def at(self, reason: Reason) -> None:
        """Set the reason that is recorded for whatever freezes from now on."""
        self._why = reason

    def fresh(self, extent: int, label: str) -> Expr:
        """A new axis; sizes zero and one have nothing to widen."""
        return (Atom(extent, label),) if extent > 1 else frozen(extent)

    def resolve(self, expr: Expr) -> Expr:
        """`expr` with everything known put in."""
        if not any(isinstance(f, Cat) or (isinstance(f, Atom) and f.resolved is not None) for f in expr):
            return expr
        return product(self._resolve(factor) for factor in expr)

    def _resolve(self, factor: Factor) -> Expr:
        if isinstance(factor, Cat):
            return concat(self.resolve(part) for part in factor.parts)
        if isinstance(factor, Atom) and factor.resolved is not None:
            factor.resolved = self.resolve(factor.resolved)
            return factor.resolved
        return (factor,)

    def _define(self, atom: Atom, expr: Expr) -> None:
        atom.definition = atom.resolved = expr
        self.version += 1
        atom.joined, atom.step = self._why, self.version

    def freeze(self, expr: Expr, reason: Reason | None = None) -> Expr:
        """Freeze every atom of `expr`; returns the frozen axis."""
        for atom in list(atoms(self.resolve(expr))):
            if atom.definition is None:
                atom.reason = reason or self._why
                self._define(atom, (atom.size,))
        return self.resolve(expr)

    def unify(self, a: Expr, b: Expr) -> Expr:
        """Make two axes the same axis; where their structures cannot agree, both freeze there."""
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return a
        if size(a) != size(b):
            raise AxisMismatchError(f"{show(a)} and {show(b)} at {self._why.node} ({self._why.op})")
        if is_frozen(a) or is_frozen(b):
            meets = replace(self._why, text="it meets an axis that stays as it is")
            self.freeze(a, meets)
            return self.freeze(b, meets)
        for one, other in ((a, b), (b, a)):
            head = one[0]
            if len(one) == 1 and isinstance(head, Atom):
                if head in atoms(other):
                    self.freeze(other)
                else:
                    self._define(head, other)
                return self.resolve(other)
        if isinstance(a[0], Cat) or isinstance(b[0], Cat):
            self._unify_parts(a, b)
        else:
            self._unify_factors(a, b)
        return self.resolve(a)

    def _unify_parts(self, a: Expr, b: Expr) -> None:
        while True:
            left, right = _pieces(self.resolve(a)), _pieces(self.resolve(b))
            if len(left) == 1 and len(right) == 1:
                self.unify(left[0], right[0])
                return
            extent = min(size(left[0]), size(right[0]))
            first_a, a = self.cut(concat(left), extent)
            first_b, b = self.cut(concat(right), extent)
            self.unify(first_a, first_b)
            if a == (0,):
                return

    def _unify_factors(self, a: Expr, b: Expr) -> None:
        while a and b:
            small = min(size(a[:1]), size(b[:1]))
            if size(a[:1]) % small or size(b[:1]) % small:
                self.freeze(a)
                self.freeze(b)
                return
            (head_a, a), (head_b, b) = self.split(a, small), self.split(b, small)
            self.unify(head_a, head_b)
            a, b = self.resolve(a), self.resolve(b)

    def split(self, expr: Expr, outer: int) -> tuple[Expr, Expr]:
        """`expr` as a product of an axis of `outer` elements and the axis inside it."""
        expr = self.resolve(expr)
        total = size(expr)
        if outer == 1:
            return (), expr
        if outer == total:
            return expr, ()
        if is_frozen(expr):
            return frozen(outer), frozen(total // outer)
        head, rest = expr[0], expr[1:]
        extent = size((head,))
        if outer % extent == 0:
            more, inner = self.split(rest, outer // extent)
            return self.resolve(product(((head,), more))), self.resolve(inner)
        if extent % outer:
            self.freeze(expr)
            return frozen(outer), frozen(total // outer)
        inner = extent // outer
        if isinstance(head, int):
            return frozen(outer), product((frozen(inner), rest))
        if isinstance(head, Atom):
            first, second = Atom(outer, f"{head.label}.0"), Atom(inner, f"{head.label}.1")
            self._define(head, (first, second))
            return (first,), self.resolve(product(((second,), rest)))
        left, right = self._split_cat(head, outer, inner)
        return self.resolve(left), self.resolve(product((right, rest)))

    def _split_cat(self, cat: Cat, outer: int, inner: int) -> tuple[Expr, Expr]:
        bounds = set(accumulate(map(size, cat.parts), initial=0))
        aligned = outer <= len(cat.parts) and bounds.issuperset(range(0, outer * inner, inner))
        if not aligned and all(size(part) % inner == 0 for part in cat.parts):  # a common suffix
            pairs = [self.split(part, size(part) // inner) for part in cat.parts]
            for _, suffix in pairs[1:]:
                self.unify(pairs[0][1], suffix)
            return self.resolve(concat(head for head, _ in pairs)), self.resolve(pairs[0][1])
        if aligned or outer <= self.EXPAND:  # equal groups
            rest: Expr = (cat,)
            groups: list[Expr] = []
            for _ in range(outer - 1):
                group, rest = self.cut(rest, inner)
                groups.append(group)
            for group in groups:
                self.unify(group, rest)
            return frozen(outer), self.resolve(rest)
        self.freeze((cat,))
        return frozen(outer), frozen(inner)

    def cut(self, expr: Expr, at: int) -> tuple[Expr, Expr]:
        """`expr` as a concatenation of its first `at` elements and the others; an empty side is `(0,)`."""
        expr = self.resolve(expr)
        if at == 0:
            return (0,), expr
        if at == size(expr):
            return expr, (0,)
        left: list[Expr] = []
        right: list[Expr] = []
        for part in _pieces(expr):
            extent, begin = size(part), sum(map(size, left))
            if right or begin == at:
                right.append(part)
            elif begin + extent <= at:
                left.append(part)
            else:
                first, second = self._cut_product(part, at - begin)
                left.append(first)
                right.append(second)
        return self.resolve(concat(left)), self.resolve(concat(right))

    def _cut_product(self, expr: Expr, at: int) -> tuple[Expr, Expr]:
        total = size(expr)
        if not is_frozen(expr):
            head, rest = expr[0], expr[1:]
            stride = size(rest)
            if at % stride == 0 and isinstance(head, int):
                k = at // stride
                return product((frozen(k), rest)), product((frozen(head - k), rest))
            if at % stride == 0 and isinstance(head, Atom):
                k = at // stride
                first = self.fresh(k, f"{head.label}[:{k}]")
                second = self.fresh(head.size - k, f"{head.label}[{k}:]")
                self._define(head, concat((first, second)))
                return self.resolve(product((first, rest))), self.resolve(product((second, rest)))
            if isinstance(head, Cat) or (isinstance(head, int) and head <= self.EXPAND):
                return self.cut(expr if isinstance(head, Cat) else concat([rest] * head), at)
            self.freeze(expr)
        return frozen(at), frozen(total - at)
