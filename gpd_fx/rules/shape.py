"""Rules that move axes about without touching values: reshape, permute, expand, repeat, stack and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from gpd_fx.axes.expressions import (
    Expr,
    frozen,
    product,
    size,
)
from gpd_fx.axes.solver import AxisSolver
from gpd_fx.rules.effects import Extent, Extents, SymbolicSize
from gpd_fx.rules.site import Axes, Site, Value


def reshape_axes(solver: AxisSolver, axes: Sequence[Expr], shape: Sequence[int]) -> Axes:
    """The axes of `axes` after a row-major reshape to `shape`.

    Neighbouring axes are taken together until both sides have equally many elements, then split anew.
    """
    if 0 in shape or 0 in map(size, axes):
        for axis in axes:
            solver.freeze(axis)
        return [frozen(extent) for extent in shape]
    out: Axes = []
    rest = [solver.resolve(axis) for axis in axes if size(axis) != 1]
    todo = [extent for extent in shape if extent != 1]
    while todo:
        have, want = [rest.pop(0)], [todo.pop(0)]
        have_size, want_size = size(have[0]), want[0]
        while have_size != want_size:
            if have_size < want_size:
                have.append(rest.pop(0))
                have_size *= size(have[-1])
            else:
                want.append(todo.pop(0))
                want_size *= want[-1]
        inner = solver.resolve(product(have))
        for extent in want[:-1]:
            outer, inner = solver.split(inner, extent)
            out.append(outer)
        out.append(inner)
    found = iter(out)
    return [solver.resolve(next(found)) if extent != 1 else () for extent in shape]


def _reshape(site: Site, operand: fx.Node) -> Axes:
    site.solver.at(site.reason("the reshape cuts through these channels"))
    return reshape_axes(site.solver, site.axes(operand), site.out_shape)


def reshape(site: Site) -> Value:
    """view, reshape: the sizes follow the axes."""
    axes = _reshape(site, site.node.args[0])  # pyright: ignore[reportArgumentType]  a node by schema
    name = "size" if site.has_arg("size") else "shape"
    site.effects.append(Extents(name, tuple(axes)))
    return axes


def regroup(site: Site) -> Value:
    """flatten, squeeze, unsqueeze: reshapes without size arguments."""
    return _reshape(site, site.node.args[0])  # pyright: ignore[reportArgumentType]  a node by schema


def unflatten(site: Site) -> Value:
    """unflatten: the sizes of the new axes follow them."""
    axes = _reshape(site, site.arg("self"))
    start = site.dim(site.arg("dim"), len(site.axes(site.arg("self"))))
    site.effects.append(Extents("sizes", tuple(axes[start : start + len(site.arg("sizes"))])))
    return axes


def like_other(site: Site) -> Value:
    """view_as, reshape_as, expand_as: the result has the other tensor's shape, hence must have its axes."""
    other = site.axes(site.arg("other"))
    mine = site.axes(site.arg("self")) if "expand" in site.op else _reshape(site, site.arg("self"))
    for axis, goal in zip(reversed(mine), reversed(other), strict=False):
        if size(axis) == size(goal):
            site.solver.unify(axis, goal)
    return [site.solver.resolve(axis) for axis in other]


def permute(site: Site) -> Value:
    """permute."""
    axes = site.axes(site.arg("self"))
    return [axes[dim] for dim in site.arg("dims")]


def transpose(site: Site) -> Value:
    """transpose, swapaxes, t, mT and the like: two dimensions change places, by default the last two."""
    axes = site.axes(site.arg("self"))
    names = [a.name for a in site.schema.arguments[1:]]
    first, second = [site.arg(name) for name in names] if names else (-2, -1)
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    return axes


def reverse(site: Site) -> Value:
    """numpy_T: all dimensions change places."""
    return site.axes(site.arg("self"))[::-1]


def movedim(site: Site) -> Value:
    """movedim."""
    axes = site.axes(site.arg("self"))
    rank = len(axes)
    source, target = ([d] if isinstance(d, int) else d for d in (site.arg("source"), site.arg("destination")))
    moved = {t % rank: axes[s % rank] for s, t in zip(source, target, strict=True)}
    rest = iter([axis for k, axis in enumerate(axes) if k not in {s % rank for s in source}])
    return [moved[k] if k in moved else next(rest) for k in range(rank)]


def expand(site: Site) -> Value:
    """expand: repeated size-one axes are new ones, which may widen with what they meet."""
    axes, shape = site.axes(site.arg("self")), site.out_shape
    given: list[Any] = list(site.arg("size"))
    padded = [()] * (len(shape) - len(axes)) + axes
    out: Axes = []
    for dim, (axis, extent, arg) in enumerate(zip(padded, shape, given, strict=True)):
        grown = size(axis) == 1 and extent > 1
        out.append(created(site, dim, extent, symbolic=isinstance(arg, fx.Node)) if grown else axis)
    site.effects.append(Extents("size", tuple(out)))
    return out


def created(site: Site, dim: int, extent: int, *, symbolic: bool) -> Expr:
    """The axis that this node creates; the same one in every sweep. Sizes of the batch stay as they are."""
    if symbolic:
        return frozen(extent)
    key = (site.node, dim)
    if key not in site.created:
        site.created[key] = site.solver.fresh(extent, f"{site.node.name}.{dim}")
    return site.solver.resolve(site.created[key])


def create(site: Site) -> Value:
    """zeros, ones, full, empty, new_zeros and the like: all elements alike, so every axis is free."""
    given: list[Any] = list(site.arg("size"))
    sizes = zip(site.out_shape, given, strict=True)
    axes = [created(site, dim, n, symbolic=isinstance(arg, fx.Node)) for dim, (n, arg) in enumerate(sizes)]
    site.effects.append(Extents("size", tuple(axes)))
    return axes


def like_self(site: Site) -> Value:
    """zeros_like and the like."""
    return site.axes(site.arg("self"))


def repeat(site: Site) -> Value:
    """repeat, tile: an axis becomes an outer frozen factor times itself, an axis of size one a new axis."""
    name = "repeats" if site.has_arg("repeats") else "dims"
    axes, counts = site.axes(site.arg("self")), list(site.arg(name))
    counts = [1] * (len(axes) - len(counts)) + counts
    axes = [()] * (len(counts) - len(axes)) + axes
    out: Axes = []
    extents: list[Expr] = []
    for dim, (axis, count, extent) in enumerate(zip(axes, counts, site.out_shape, strict=True)):
        grown = size(axis) == 1 and extent > 1
        extents.append(created(site, dim, extent, symbolic=isinstance(count, fx.Node)) if grown else ())
        times = () if size(axis) == extent else frozen(extent // max(size(axis), 1))
        out.append(extents[-1] if grown else product((times, axis)))
    site.effects.append(Extents(name, tuple(extents[len(extents) - len(site.arg(name)) :])))
    return out


def repeat_interleave(site: Site) -> Value:
    """repeat_interleave by a number: the repeated axis times an inner frozen factor, or a new axis."""
    count = site.arg("repeats")
    if site.arg("dim") is None or not isinstance(count, int):
        return site.freeze_all("it flattens its operand or repeats by data")
    axes = site.axes(site.arg("self"))
    dim = site.dim(site.arg("dim"), len(axes))
    if size(axes[dim]) == 1:
        axes[dim] = created(site, dim, count, symbolic=False)
        site.effects.append(Extent("repeats", axes[dim]))
    else:
        axes[dim] = product((axes[dim], frozen(count)))
    if isinstance(site.arg("output_size"), int):
        site.effects.append(Extent("output_size", axes[dim]))
    return axes


def kron(site: Site) -> Value:
    """kron: each axis is the product of those of the operands, aligned from the last."""
    operands = [site.axes(site.arg(name)) for name in ("self", "other")]
    rank = max(map(len, operands))
    left, right = [[()] * (rank - len(axes)) + axes for axes in operands]
    return [product(pair) for pair in zip(left, right, strict=True)]


def diagonal(site: Site) -> Value:
    """diagonal: of two frozen dimensions, put last."""
    axes = site.axes(site.arg("self"))
    dims = [site.dim(site.arg(name), len(axes)) for name in ("dim1", "dim2")]
    for dim in dims:
        site.freeze(axes[dim], "its diagonal is taken")
    return [*[axis for dim, axis in enumerate(axes) if dim not in dims], frozen(site.out_shape[-1])]


def windows(site: Site) -> Value:
    """unfold: windows of a frozen dimension, which are put last."""
    axes = site.axes(site.arg("self"))
    dim = site.dim(site.arg("dimension"), len(axes))
    site.freeze(axes[dim], "windows of it are taken")
    axes[dim] = frozen(site.out_shape[dim])
    return [*axes, frozen(site.out_shape[-1])]


def unbind(site: Site) -> Value:
    """unbind: one tensor for each index of a frozen axis."""
    axes = site.axes(site.arg("self"))
    dim = site.dim(site.arg("dim"), len(axes))
    count = size(site.freeze(axes[dim], "it is taken apart index by index"))
    return tuple([*axes[:dim], *axes[dim + 1 :]] for _ in range(count))


def select(site: Site) -> Value:
    """select: one index of a frozen axis."""
    axes = site.axes(site.arg("self"))
    dim = site.dim(site.arg("dim"), len(axes))
    site.freeze(axes[dim], "one index of it is picked")
    return [*axes[:dim], *axes[dim + 1 :]]


def stack(site: Site) -> Value:
    """stack: a new frozen axis; all others are shared."""
    first, *others = [site.axes(node) for node in site.arg("tensors")]
    for other in others:
        first = [site.solver.unify(a, b) for a, b in zip(first, other, strict=True)]
    dim = site.dim(site.arg("dim"), len(first) + 1)
    return [*first[:dim], frozen(len(others) + 1), *first[dim:]]


def rearrange(site: Site) -> Value:
    """roll, flip: the dimensions that move are frozen."""
    axes = site.axes(site.arg("self"))
    dims = site.arg("dims") or range(len(axes))
    for dim in [dims] if isinstance(dims, int) else dims:
        axes[dim] = site.freeze(axes[dim], "its elements change places")
    return axes


def symbolic_size(site: Site) -> Value:
    """sym_size: downstream arithmetic works on the model's sizes."""
    axes = site.axes(site.arg("self"))
    site.effects.append(SymbolicSize(axes[site.arg("dim")]))
    return None


def glu(site: Site) -> Value:
    """glu: the halves of an axis are gated against each other, so they are the same axis."""
    axes = site.axes(site.arg("self"))
    dim = site.dim(site.arg("dim"), len(axes))
    site.solver.at(site.reason("the halves of the gate cut through these channels"))
    left, right = site.solver.cut(axes[dim], size(axes[dim]) // 2)
    axes[dim] = site.solver.unify(left, right)
    return axes
