"""Normalisations, distances, and weights given by direction and length."""

from __future__ import annotations

from string import ascii_lowercase

from gpd_fx.axes.expressions import size
from gpd_fx.rules.effects import Extents, Linear, Shared
from gpd_fx.rules.index import broadcast
from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.reduce import statistics
from gpd_fx.rules.site import Site, Value

_CDIST = Einsum("* m ^d, * n ^d -> * m n")


def batch_norm(site: Site) -> Value:
    """batch_norm: in train mode with statistics over all dimensions but the channels' (weights are standardised so)."""
    return _per_channel(site, 0 if site.arg("training") else None)


def instance_norm(site: Site) -> Value:
    """instance_norm: statistics over the dimensions behind the channels'."""
    return _per_channel(site, 2 if site.arg("use_input_stats") else None)


def _per_channel(site: Site, first: int | None) -> Value:
    """Channels are dimension 1; statistics, if any, are taken over the other dimensions from `first` on."""
    axes = site.axes(site.arg("input"))
    for node in site.tensors()[1:]:
        if node is not None:
            axes[1] = site.solver.unify(axes[1], site.axes(node)[0])
    if first is None:
        return axes
    if site.arg("running_mean") is not None:  # they follow the unbiased variance, and averages over the batch
        for dim in (0, *range(2, len(axes))):
            site.freeze(axes[dim], "running statistics are taken over it", natural=dim > 1)
    statistics(site, axes, [dim for dim in range(first, len(axes)) if dim != 1])
    return axes


def layer_norm(site: Site) -> Value:
    """layer_norm, rms_norm: statistics over the last dimensions, whose sizes are an argument."""
    count = len(site.arg("normalized_shape"))
    names = list(ascii_lowercase[:count])
    weight = " ".join(names)
    operands = ", ".join([f"* {' '.join('~' + name for name in names)}", *[weight] * (len(site.tensors()) - 1)])
    value = Einsum(f"{operands} -> * {weight}")(site)
    assert isinstance(value, list)
    site.effects.append(Extents("normalized_shape", tuple(value[len(value) - count :])))
    return value


def weight_norm(site: Site) -> Value:
    """_weight_norm: v * g / |v|, the norm being taken over all dimensions but one (-1: over all)."""
    axes, lengths = site.axes(site.arg("v")), site.axes(site.arg("g"))
    if len(lengths) > len(axes):
        return site.freeze_all("the lengths have more dimensions than the directions")
    normed = tuple(None if dim == site.arg("dim") else axis for dim, axis in enumerate(axes))
    site.effects.append(Shared("v", normed, back=True))
    return broadcast(site, axes, lengths)


def cosine_similarity(site: Site) -> Value:
    """cosine_similarity: both operands go in times the square root of alpha."""
    operands = {name: site.axes(site.arg(name)) for name in ("x1", "x2")}
    axes = broadcast(site, *operands.values())
    dim = site.dim(site.arg("dim"), len(axes))
    for name, own in operands.items():
        at = dim - len(axes) + len(own)
        if at < 0 or size(own[at]) != size(axes[dim]) or site.symbolic(site.arg(name), at):
            site.freeze(axes[dim], "an operand is the same all along it, or its size is known only at run time")
        else:
            site.effects.append(Shared(name, tuple(axes[dim] if k == at else None for k in range(len(own)))))
    return [*axes[:dim], *axes[dim + 1 :]]


def pairwise_distance(site: Site) -> Value:
    """pairwise_distance: a p-norm over the last dimension, of differences to which a constant is added."""
    axes = broadcast(site, site.axes(site.arg("x1")), site.axes(site.arg("x2")))
    p, last = float(site.arg("p")), len(axes) - 1
    if p <= 0:
        return site.freeze_all(f"a norm of order {p}")
    if p != float("inf"):
        statistics(site, axes, [last])
        site.effects.append(Linear("x1", tuple(axis if k == last else None for k, axis in enumerate(axes)), p=p))
    return [*axes[:-1], ()] if site.arg("keepdim") else axes[:-1]


def cdist(site: Site) -> Value:
    """cdist: p-norms of differences of rows; both operands go in times alpha**(1/p)."""
    p = float(site.arg("p"))
    if p <= 0:
        return site.freeze_all(f"a norm of order {p}")
    value = _CDIST(site)
    for name in ("x1", "x2"):
        *rows, last = site.axes(site.arg(name))
        if site.symbolic(site.arg(name), len(rows)):
            site.freeze(last, "a distance is taken over it, and its size is known only at run time")
        elif p != float("inf"):
            site.effects.append(Shared(name, (*[None] * len(rows), last), p))
    return value
