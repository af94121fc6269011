"""The copies that a plan chooses: which original channel each wide channel holds, and its share of it.

`Copies` says so for one atom: alpha is the share with which a copy enters a contraction. `Widening` extends both to
axis expressions: to products, whose copies multiply, and to concatenations, whose copies follow each other.

A widening may stand on another one, its base, that has been trained: copies are then made of the base's copies, whose
values differ by now, and divide their shares. The r-th copy of a channel is made of copy r mod m, where the base has m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpd_fx.axes.expressions import (
    Atom,
    Cat,
    Expr,
    atoms,
    parts,
    size,
)
from gpd_fx.axes.solver import AxisSolver


@dataclass(frozen=True)
class Copies:
    """How one atom is widened: `gather[j]` is the original channel in wide channel j, `alpha[j]` its share."""

    gather: Tensor
    alpha: Tensor

    @property
    def multiplicity(self) -> int | None:
        """Copies of each channel where all channels have equally many, else None."""
        counts = torch.bincount(self.gather)
        return int(counts[0]) if bool((counts == counts[0]).all()) else None


def parents(gather: Tensor, base: Tensor) -> Tensor:
    """int64 `[wide size]`: the place in the base of the copy that each copy is made of.

    Both arguments give the channel that each place holds; the base has every channel.
    """
    counts, _ = _counted(base)
    places = base.argsort(stable=True)  # by channel, in order
    return places[(counts.cumsum(0) - counts)[gather] + _counted(gather)[1] % counts[gather]]


def _counted(gather: Tensor) -> tuple[Tensor, Tensor]:
    """How many copies each channel has, and how many of its channel come before each copy."""
    counts = torch.bincount(gather)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    before = torch.empty_like(gather)
    before[gather.argsort(stable=True)] = torch.arange(len(gather)) - starts
    return counts, before


class Widening:
    """The chosen copies of every widened atom, extended to expressions; `base` is what they are copies of, or None."""

    def __init__(self, solver: AxisSolver, copies: dict[Atom, Copies], base: Widening | None = None) -> None:
        self._solver = solver
        self.copies = copies
        self.base = base

    def widens(self, expr: Expr) -> bool:
        """Whether any part of `expr` is widened."""
        return any(atom in self.copies for atom in atoms(self._solver.resolve(expr)))

    def size(self, expr: Expr) -> int:
        """Number of elements along the widened `expr`."""
        return self._size(self._solver.resolve(expr))

    def _size(self, expr: Expr) -> int:
        total = 1
        for factor in expr:
            if isinstance(factor, Cat):
                total *= sum(map(self._size, factor.parts))
            elif isinstance(factor, Atom) and factor in self.copies:
                total *= len(self.copies[factor].gather)
            else:
                total *= size((factor,))
        return total

    def gather(self, expr: Expr) -> Tensor:
        """int64 [wide size]: the original index that each wide index holds."""
        return self._map(self._solver.resolve(expr))[0]

    def keep(self, expr: Expr) -> Tensor:
        """int64 [size]: where each original index lies in the wide axis."""
        return self._map(self._solver.resolve(expr))[1]

    def _map(self, expr: Expr) -> tuple[Tensor, Tensor]:
        gather, keep = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for factor in expr:
            if isinstance(factor, Cat):
                maps = [self._map(part) for part in factor.parts]
                f_gather = _stack([g for g, _ in maps], [size(p) for p in factor.parts])
                f_keep = _stack([k for _, k in maps], [len(g) for g, _ in maps])
            elif isinstance(factor, Atom) and factor in self.copies:
                f_gather, f_keep = self.copies[factor].gather, torch.arange(factor.size)
            else:
                f_gather = f_keep = torch.arange(size((factor,)))
            gather = (gather[:, None] * len(f_keep) + f_gather).flatten()
            keep = (keep[:, None] * len(f_gather) + f_keep).flatten()
        return gather, keep

    def alpha(self, expr: Expr) -> Tensor:
        """float64 [wide size]: a partition of unity over the copies of each channel."""
        return self._alpha(self._solver.resolve(expr))

    def _alpha(self, expr: Expr) -> Tensor:
        alpha = torch.ones(1, dtype=torch.float64)
        for factor in expr:
            if isinstance(factor, Cat):
                share = torch.cat([self._alpha(part) for part in factor.parts])
            elif isinstance(factor, Atom) and factor in self.copies:
                share = self.copies[factor].alpha
            else:
                share = torch.ones(size((factor,)), dtype=torch.float64)
            alpha = (alpha[:, None] * share).flatten()
        return alpha

    def even(self, expr: Expr) -> Tensor:
        """float64 [wide size]: the shares with which copies enter a sum that no weight enters.

        They are equal where all elements have equally many copies, and alpha otherwise; copies of copies divide theirs
        equally.
        """
        if self.base is None:
            count = self.multiplicity(expr)
            return self.alpha(expr) if count is None else torch.full((self.size(expr),), 1 / count, dtype=torch.float64)
        index = parents(self.gather(expr), self.base.gather(expr))
        return (self.base.even(expr) / torch.bincount(index))[index]

    def multiplicity(self, expr: Expr) -> int | None:
        """Copies of each element where all elements have equally many, else None."""
        counts = [self._multiplicity(part) for part in parts(self._solver.resolve(expr))]
        return counts[0] if all(count == counts[0] for count in counts) else None

    def _multiplicity(self, expr: Expr) -> int | None:
        total = 1
        for factor in expr:
            count: int | None = 1
            if isinstance(factor, Cat):
                count = self.multiplicity((factor,))
            elif isinstance(factor, Atom) and factor in self.copies:
                count = self.copies[factor].multiplicity
            if count is None:
                return None
            total *= count
        return total


def _stack(maps: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    offset, out = 0, []
    for index, extent in zip(maps, sizes, strict=True):
        out.append(index + offset)
        offset += extent
    return torch.cat(out)
