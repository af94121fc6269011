"""Rules of the concatenation algebra: cat, split, chunk, slice, narrow, pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpd_fx.axes.expressions import (
    Expr,
    concat,
    frozen,
    size,
)
from gpd_fx.rules.effects import Bounds, Pieces
from gpd_fx.rules.site import Rule, Site, Value

_END = 2**63 - 1  # how captures write the end of an open slice
_AT_RUN_TIME = "it is cut, and its size or the place of the cut is known only at run time"


def cat(site: Site) -> Value:
    """cat: the axis is the concatenation of its parts."""
    return _join(site, site.arg("dim"))


def join_along(dim: int) -> Rule:
    """hstack and its kin, for tensors that have the dimension already."""

    def rule(site: Site) -> Value:
        """vstack, hstack, dstack, column_stack: cat, for tensors that have the dimension already."""
        return _join(site, 0 if dim == 1 and len(site.out_shape) == 1 else dim)

    return rule


def _join(site: Site, dim: int) -> Value:
    operands = [site.axes(node) for node in site.arg("tensors")]
    ranks = {len(axes) for axes in operands}
    if len(ranks) > 1 or dim >= max(ranks) or len(site.out_shape) not in ranks:
        return site.freeze_all("it joins tensors of different or too few dimensions")
    dim = site.dim(dim, len(operands[0]))
    first, *others = operands
    for other in others:
        first = [a if d == dim else site.solver.unify(a, b) for d, (a, b) in enumerate(zip(first, other, strict=True))]
    first[dim] = site.solver.resolve(concat(axes[dim] for axes in operands))
    return first


def _pieces(site: Site, sizes: Sequence[int], dim: int) -> list[Expr]:
    site.solver.at(site.reason("it cuts through these channels"))
    rest = site.axes(site.arg("self"))[dim]
    out: list[Expr] = []
    for extent in sizes:
        head, rest = site.solver.cut(rest, extent)
        out.append(head)
    return [site.solver.resolve(piece) for piece in out]


def split(site: Site) -> Value:
    """split, split_with_sizes, chunk, tensor_split: the axis is the concatenation of the pieces."""
    axes = site.axes(site.arg("self"))
    dim = site.dim(site.arg("dim"), len(axes))
    if site.symbolic(site.arg("self"), dim):
        site.freeze(axes[dim], _AT_RUN_TIME)
    pieces = _pieces(site, [shape[dim] for shape in site.out_shapes], dim)
    site.effects.append(Pieces(tuple(pieces), dim))
    return tuple([*axes[:dim], piece, *axes[dim + 1 :]] for piece in pieces)


def slice_axis(site: Site) -> Value:
    """slice with step one: a piece of the axis. Other steps freeze it."""
    return _taken(site, site.arg("start") or 0, site.arg("step"), end=True)


def narrow(site: Site) -> Value:
    """narrow: a slice given by its length."""
    return _taken(site, site.arg("start"), 1, end=False)


def _taken(site: Site, start: Any, step: Any, *, end: bool) -> Value:
    axes = site.axes(site.arg("self"))
    dim = site.dim(site.arg("dim"), len(axes))
    whole, taken = size(axes[dim]), site.out_shape[dim]
    if end and start == 0 and step == 1 and site.arg("end") in (None, _END):
        return axes
    if step != 1 or not isinstance(start, int) or site.symbolic(site.arg("self"), dim):
        site.freeze(axes[dim], "every n-th index is taken" if step != 1 else _AT_RUN_TIME)
        axes[dim] = frozen(taken)
        return axes
    start = min(max(start + whole if start < 0 else start, 0), whole)
    before, inside, behind = _pieces(site, [start, taken, whole - start - taken], dim)
    site.effects.append(Bounds(before, inside, behind, end))
    axes[dim] = inside
    return axes


def pad(site: Site) -> Value:
    """pad: constant padding puts frozen channels before and behind; other modes and cropping freeze."""
    axes = site.axes(site.arg("self"))
    amounts = list(site.arg("pad"))
    constant = not site.has_arg("mode") or site.arg("mode") == "constant"
    for k in range(len(amounts) // 2):
        before, behind = amounts[2 * k], amounts[2 * k + 1]
        dim = len(axes) - 1 - k
        if before == 0 and behind == 0:
            continue
        plain = constant and isinstance(before, int) and isinstance(behind, int) and min(before, behind) >= 0
        if not plain:
            site.freeze(axes[dim], "it is padded with its own values, or cropped")
            axes[dim] = frozen(site.out_shape[dim])
            continue
        sides = [frozen(before)] * (before > 0), [frozen(behind)] * (behind > 0)
        axes[dim] = site.solver.resolve(concat([*sides[0], axes[dim], *sides[1]]))
    return axes
