"""One-line rules in the manner of einsum.

    conv2d       n (g i) _ _, (g o) i _ _, (g o) -> n (g o) _ _

Operands are the op's tensor arguments in schema order, separated by commas; each word is a dimension:

    c        a factor: wherever it occurs it is the same axis
    (g i)    a product of factors, outermost first
    ~c       a factor over which the op takes statistics: its elements need equally many copies
    ^c       a factor that the op reduces and copies cannot change (a maximum)
    _        a frozen dimension; so is every upper-case word, which only reads better
    *        any number of dimensions that all operands marked with it share, broadcast from the right
    ...      any number of frozen dimensions of one operand's own

Several results that all have the same axes are written once. Alternatives for other ranks are separated by `|`.

A factor of two operands that the result lacks is contracted: the op must be linear in either operand there. A factor of
one operand only, neither kept nor marked, is refused when the rule is read. Integer arguments of the op may be tied to
factors (`groups="g"`); they give a factor its size, and follow it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import fx

from gpd_fx.axes.expressions import (
    Expr,
    frozen,
    product,
    size,
)
from gpd_fx.rules.effects import Contract, Extent
from gpd_fx.rules.site import Axes, Site, Value

_WORD = re.compile(r"\.\.\.|\*|_|[~^]?[A-Za-z]\w*|\([^()]*\)")


@dataclass(frozen=True)
class Word:
    """One dimension of a pattern, or a run of them: `kind` is "factors", "frozen", "shared" or "own"."""

    kind: str
    factors: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> Word:
        """Read one word."""
        if text in ("*", "..."):
            return Word("shared" if text == "*" else "own")
        if text == "_":
            return Word("frozen")
        return Word("factors", tuple(text.strip("()").split()))


@dataclass(frozen=True)
class Pattern:
    """The dimensions of one operand or result."""

    words: tuple[Word, ...]

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read the words of one operand."""
        words = tuple(Word.parse(match) for match in _WORD.findall(text))
        if _WORD.sub("", text).strip():
            raise ValueError(f"cannot read the pattern {text!r}")
        return Pattern(words)

    @cached_property
    def run(self) -> int | None:
        """Position of `*` or `...`."""
        return next((k for k, word in enumerate(self.words) if word.kind in ("shared", "own")), None)

    def fits(self, rank: int) -> bool:
        """Whether a tensor of that rank has these dimensions."""
        return rank == len(self.words) if self.run is None else rank >= len(self.words) - 1

    def spread(self, rank: int) -> list[Word]:
        """One word for each dimension; the words of a run are repeated."""
        if self.run is None:
            return list(self.words)
        extra = rank - len(self.words) + 1
        return [*self.words[: self.run], *([self.words[self.run]] * extra), *self.words[self.run + 1 :]]

    def letters(self) -> list[str]:
        """All factors named, marks included."""
        return [letter for word in self.words for letter in word.factors]


class Spec:
    """One alternative of a rule: patterns of the operands and of the results."""

    def __init__(self, text: str) -> None:
        left, right = text.split("->")
        self.text = text.strip()
        self.operands = [Pattern.parse(part) for part in left.split(",")]
        self.results = [Pattern.parse(part) for part in right.split(",")]
        kept = {letter for pattern in self.results for letter in pattern.letters()}
        where: dict[str, int] = {}
        marked: set[str] = set()
        for pattern in self.operands:
            for letter in {name.lstrip("~^") for name in pattern.letters()}:
                where[letter] = where.get(letter, 0) + 1
            marked.update(name.lstrip("~^") for name in pattern.letters() if name[0] in "~^")
        gone = {letter for letter in where if letter not in kept and letter not in marked and letter[0].islower()}
        lost = sorted(letter for letter in gone if where[letter] == 1)
        if lost:
            raise ValueError(f"{self.text!r} loses {', '.join(lost)}: mark it ~ or ^, freeze it, or keep it")
        unborn = sorted(letter for letter in kept if letter not in where and letter[0].islower())
        if unborn:
            raise ValueError(f"{self.text!r} makes {', '.join(unborn)} out of nothing")
        self.contracted = gone

    def fits(self, ranks: list[int | None]) -> bool:
        """Whether operands of these ranks (None: not given) match."""
        if len(ranks) < len(self.operands):
            return False
        given = [rank for rank in ranks[len(self.operands) :] if rank is not None]
        pairs = zip(self.operands, ranks, strict=False)
        return not given and all(rank is None or pattern.fits(rank) for pattern, rank in pairs)


class Einsum:
    """A rule written in the notation. `extents` ties integer arguments to factors."""

    def __init__(self, text: str, **extents: str) -> None:
        self.text = text
        self.specs = [Spec(part) for part in text.split("|")]
        self.extents = extents

    def __call__(self, site: Site) -> Value:
        names = [a.name for a in site.schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]
        return self.apply(site, site.tensors(), names)

    def apply(self, site: Site, operands: Sequence[fx.Node | None], names: Sequence[str]) -> Value:
        """The rule for given operands; `names` are their arguments, `tensors.0` for an element of a list."""
        for name in self.extents:
            if not isinstance(site.arg(name), int):
                return site.freeze_all(f"its {name} are known only at run time")
        ranks = [None if operand is None else len(site.axes(operand)) for operand in operands]
        for spec in self.specs:
            if spec.fits(ranks):
                return _Application(site, spec, operands, names, self.extents).run()
        return site.freeze_all(f"its rule has no form for operands of ranks {ranks}")


class _Application:
    """One spec applied to one node."""

    def __init__(
        self,
        site: Site,
        spec: Spec,
        operands: Sequence[fx.Node | None],
        names: Sequence[str],
        extents: dict[str, str],
    ) -> None:
        self.site, self.spec, self.extents = site, spec, extents
        given = [(p, n, name) for p, n, name in zip(spec.operands, operands, names, strict=False) if n is not None]
        self.nodes = [(pattern, node) for pattern, node, _ in given]
        self.names = [name for _, _, name in given]
        self.bound: dict[str, Expr] = {}
        self.shared: Axes = []
        self.sizes: dict[str, int] = {}
        for pattern, shape in zip(spec.results, self.shapes(), strict=False):
            for word, extent in zip(pattern.spread(len(shape)), shape, strict=True):
                if len(word.factors) == 1:
                    self.sizes[word.factors[0]] = extent
        self.sizes |= {letter: site.arg(name) for name, letter in extents.items()}

    def run(self) -> Value:
        products: list[tuple[Word, Expr]] = []
        for pattern, node in self.nodes:
            axes = self.site.axes(node)
            shared: Axes = []
            for word, axis in zip(pattern.spread(len(axes)), axes, strict=True):
                if word.kind == "shared":
                    shared.append(axis)
                elif word.kind in ("own", "frozen"):
                    self.site.freeze(axis, "the op works along this axis", natural=True)
                elif len(word.factors) == 1:
                    self.bind(word.factors[0], axis)
                else:
                    products.append((word, axis))
            self.share(shared)
        for word, axis in products:
            self.bind_product(word, axis)
        self.state_effects()
        results = [self.result(p, s) for p, s in zip(self.spec.results, self.shapes(), strict=False)]
        return self.site.results(results[0]) if len(self.spec.results) == 1 else tuple(results)

    def shapes(self) -> list[tuple[int, ...]]:
        return [self.site.out_shape] if len(self.spec.results) == 1 else list(self.site.out_shapes)

    def bind(self, letter: str, axis: Expr) -> None:
        name, solver = letter.lstrip("~^"), self.site.solver
        known = self.bound.get(name)
        if known is not None and size(axis) != size(known) and 1 in (size(axis), size(known)):
            self.bound[name] = known if size(axis) == 1 else axis  # a broadcast operand
            return
        self.bound[name] = axis if known is None else solver.unify(known, axis)
        if name[0].isupper():
            self.site.freeze(axis, "the op works along this axis")
        if letter[0] == "~":
            self.site.equal.append((axis, f"{self.site.op} takes statistics over it"))

    def bind_product(self, word: Word, axis: Expr) -> None:
        names = [letter.lstrip("~^") for letter in word.factors]
        known = {name: self.sizes.get(name, size(self.bound[name]) if name in self.bound else 0) for name in names}
        open_names = [name for name in names if not known[name]]
        if len(open_names) > 1:
            raise ValueError(f"{self.spec.text!r} leaves the sizes of {open_names} open")
        for name in open_names:
            rest = 1
            for other in names:
                rest *= known[other] or 1
            known[name] = size(axis) // rest
        for letter, name in zip(word.factors[:-1], names[:-1], strict=True):
            factor, axis = self.site.solver.split(axis, known[name])
            self.bind(letter, factor)
        self.bind(word.factors[-1], axis)

    def share(self, axes: Axes) -> None:
        solver = self.site.solver
        if len(axes) > len(self.shared):
            self.shared = [*axes[: len(axes) - len(self.shared)], *self.shared]
        for k in range(1, len(axes) + 1):
            mine, other = self.shared[-k], axes[-k]
            if size(mine) == 1:
                self.shared[-k] = other
            elif size(other) != 1:
                self.shared[-k] = solver.unify(mine, other)

    def state_effects(self) -> None:
        resolve, site = self.site.solver.resolve, self.site
        for name, letter in self.extents.items():
            site.effects.append(Extent(name, resolve(self.bound[letter])))
        for letter in sorted(self.spec.contracted):
            if size(self.bound[letter]) > 1:
                self.contract(letter)

    def contract(self, letter: str) -> None:
        site = self.site
        takers = [k for k, (pattern, _) in enumerate(self.nodes) if letter in pattern.letters()]
        weights = [k for k in takers if not site.from_input(self.nodes[k][1])]
        if not weights:
            site.shunned.append(self.bound[letter])
        taker = (weights or takers)[-1]
        pattern, node = self.nodes[taker]
        words = pattern.spread(len(site.axes(node)))
        if any(letter in word.factors and site.symbolic(node, dim) for dim, word in enumerate(words)):
            site.freeze(self.bound[letter], "it is contracted, and its size is known only at run time")
            return
        dims: list[tuple[tuple[Expr, bool], ...]] = []
        for word, axis in zip(words, site.axes(node), strict=True):
            factors = [(self.bound.get(name.lstrip("~^"), axis), name == letter) for name in word.factors]
            dims.append(tuple(factors) if letter in word.factors else ((axis, False),))
        site.effects.append(Contract(self.names[taker], tuple(dims)))

    def result(self, pattern: Pattern, shape: tuple[int, ...]) -> Axes:
        resolve = self.site.solver.resolve
        words = pattern.spread(len(shape))
        shared = list(self.shared[len(self.shared) - sum(word.kind == "shared" for word in words) :])
        axes: Axes = []
        for word, extent in zip(words, shape, strict=True):
            if word.kind == "shared":
                axes.append(resolve(shared.pop(0)))
            elif word.kind in ("own", "frozen"):
                axes.append(frozen(extent))
            else:
                known = prod(size(self.bound[name]) for name in word.factors if name in self.bound)
                new = frozen(extent // known)  # of an upper-case factor that the op makes
                axes.append(resolve(product(self.bound.get(name, new) for name in word.factors)))
        return axes
