"""The union-find of atoms: rules unify, split and freeze axes, and every operation only adds knowledge."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from gpd_fx.axes.expressions import (
    Atom,
    Cat,
    Expr,
    Factor,
    Reason,
    atoms,
    concat,
    frozen,
    is_frozen,
    pieces,
    product,
    show,
    size,
)


class AxisMismatchError(AssertionError):
    """Two axes that a rule calls equal have different sizes: the rule is wrong."""


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
            left, right = pieces(self.resolve(a)), pieces(self.resolve(b))
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
        for part in pieces(expr):
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
