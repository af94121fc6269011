"""Rules of indexing: the indexed axis is frozen, all others are free."""

from __future__ import annotations

from torch import fx

from gpd_fx.axes.expressions import size
from gpd_fx.rules.site import Axes, Site, Value


def embedding(site: Site) -> Value:
    """embedding: rows are looked up, columns pass."""
    rows, *columns = site.axes(site.arg("weight"))
    site.freeze(rows, "its indices are data")
    return [*site.axes(site.arg("indices")), *columns]


def index_select(site: Site) -> Value:
    """index_select: the dimension is frozen."""
    axes = site.axes(site.arg("self"))
    dim = site.dim(site.arg("dim"), len(axes))
    site.freeze(axes[dim], "its indices are data")
    picked = site.axes(site.arg("index"))
    axes[dim] = picked[0] if picked else ()
    return axes


def index(site: Site) -> Value:
    """x[i, j, ...] with tensors: indexed dimensions are frozen; index tensors broadcast against each other."""
    source, given = site.axes(site.arg("self")), list(site.arg("indices"))
    given += [None] * (len(source) - len(given))
    tables = [node for node in given if isinstance(node, fx.Node)]
    if any(_is_mask(node) for node in tables) or len(given) > len(source):
        return site.freeze_all("it selects by a mask")
    for axis, node in zip(source, given, strict=True):
        if node is not None:
            site.freeze(axis, "its indices are data")
    picked = _broadcast(site, [site.axes(node) for node in tables])
    places = [k for k, node in enumerate(given) if node is not None]
    together = places == list(range(places[0], places[-1] + 1))
    rest = [axis for axis, node in zip(source, given, strict=True) if node is None]
    at = places[0] if together else 0  # separated index tensors put their axes first
    return [*rest[:at], *picked, *rest[at:]]


def _is_mask(node: fx.Node) -> bool:
    return str(node.meta["val"].dtype) in ("torch.bool", "torch.uint8")


def _broadcast(site: Site, operands: list[Axes]) -> Axes:
    out: Axes = []
    for axes in operands:
        out = broadcast(site, out, axes)
    return out


def broadcast(site: Site, left: Axes, right: Axes) -> Axes:
    """The axes of two tensors broadcast against each other; those that meet are the same axis."""
    rank = max(len(left), len(right))
    left, right = [()] * (rank - len(left)) + left, [()] * (rank - len(right)) + right
    out: Axes = []
    for a, b in zip(left, right, strict=True):
        if size(a) == 1 or size(b) == 1:
            out.append(b if size(a) == 1 else a)
        else:
            out.append(site.solver.unify(a, b))
    return out


def gather(site: Site) -> Value:
    """gather: the dimension is frozen, the others are those of the index."""
    source, picked = site.axes(site.arg("self")), site.axes(site.arg("index"))
    dim = site.dim(site.arg("dim"), len(source))
    for k, (a, b) in enumerate(zip(source, picked, strict=True)):
        if k != dim and size(a) == size(b):
            site.solver.unify(a, b)
        else:
            site.freeze(a, "its indices are data")
            site.freeze(b, "it indexes another tensor")
    return [site.solver.resolve(axis) for axis in picked]


def prelu(site: Site) -> Value:
    """prelu: one slope for all, or one for each channel, which are dimension 1."""
    axes, slopes = site.axes(site.arg("self")), site.axes(site.arg("weight"))
    if slopes and size(slopes[0]) > 1:
        axes[1] = site.solver.unify(axes[1], slopes[0])
    return axes


def pointwise(site: Site) -> Value:
    """Any elementwise op: operands are broadcast against each other."""
    site.solver.at(site.reason("it meets an axis that cannot be widened"))
    nodes = [node for node in site.node.all_input_nodes if isinstance(site.value(node), list)]
    return site.results(_broadcast(site, [site.axes(node) for node in nodes]))
