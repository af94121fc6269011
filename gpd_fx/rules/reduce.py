"""Rules of ops along dimensions that an argument names: reductions, and those that need a dimension as it is."""

from __future__ import annotations

import operator
from typing import Any

from gpd_fx.axes.expressions import Expr, frozen
from gpd_fx.fxtools.node_arguments import as_dims
from gpd_fx.rules.effects import Linear, Softmax, Variance
from gpd_fx.rules.site import (
    Axes,
    Rule,
    Site,
    Value,
)


def _reduced(site: Site, dims: list[int], axes: Axes) -> Axes:
    keep = site.has_arg("keepdim") and site.arg("keepdim")
    return [() if d in dims else axis for d, axis in enumerate(axes) if keep or d not in dims]


def _dims(site: Site, axes: Axes) -> list[int]:
    return as_dims(site.arg("dim") if site.has_arg("dim") else None, len(axes))


def _linear(site: Site, *, mean: bool = False, p: float = 1.0) -> Value:
    operand = site.arg("self")
    axes = site.axes(operand)
    dims = _dims(site, axes)
    for dim in dims:
        if not (operand.meta["val"].is_floating_point() or operand.meta["val"].is_complex()):
            site.freeze(axes[dim], "integers are summed up over it")
        elif site.symbolic(operand, dim):  # no vector of shares can have its size
            statistics(site, axes, [dim])
    site.effects.append(Linear("self", tuple(a if d in dims else None for d, a in enumerate(axes)), mean, p))
    return _reduced(site, dims, axes)


def total(site: Site) -> Value:
    """sum."""
    return _linear(site)


def mean(site: Site) -> Value:
    """mean."""
    return _linear(site, mean=True)


def norm(site: Site) -> Value:
    """linalg_vector_norm, norm: a p-norm."""
    p: Any = site.arg("ord") if site.has_arg("ord") else site.arg("p")
    p = 2 if p is None else p
    if p == float("inf"):
        return extreme(site)
    if not isinstance(p, int | float) or p <= 0:
        return fixed(f"a norm of order {p} is taken over it")(site)
    return _linear(site, p=float(p))


def matrix_norm(site: Site) -> Value:
    """linalg_norm, linalg_matrix_norm: a vector norm where there is one dimension or no order; Frobenius' norm."""
    order, dims, rank = site.arg("ord"), site.arg("dim"), len(site.axes(site.arg("self")))
    count = rank if dims is None else len(as_dims(dims, rank))
    if order == "fro" or (count == 1 and not isinstance(order, str)):
        order = 2 if order == "fro" else order
    elif order is not None:
        return site.freeze_all(f"a matrix norm of order {order}")
    if order == float("inf"):
        return extreme(site)
    if order is not None and order <= 0:
        return fixed(f"a norm of order {order} is taken over it")(site)
    return _linear(site, p=float(order or 2))


def extreme(site: Site) -> Axes:
    """amax, amin, max, min, any, all: copies change nothing."""
    axes = site.axes(site.arg("self"))
    return _reduced(site, _dims(site, axes), axes)


def extreme_index(site: Site) -> Value:
    """max, min along a dimension: an index would mean nothing among copies, so it must not be used."""
    harmless = [user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in site.node.users]
    if not all(harmless):
        return fixed("indices into it are returned")(site)
    return site.results(extreme(site))


def fixed(text: str) -> Rule:
    """Scans, sorts, transforms, ...: the dimensions stay as they are, for the reason given, and all others are free."""

    def rule(site: Site) -> Value:
        axes = site.axes(site.arg("self"))
        dims = _dims(site, axes)
        for dim in dims:
            site.freeze(axes[dim], text)
        shape = site.out_shape
        if len(shape) == len(axes):
            return site.results([frozen(shape[d]) if d in dims else axis for d, axis in enumerate(axes)])
        return site.results([axis for d, axis in enumerate(axes) if d not in dims])

    rule.__doc__ = f"Along dimensions that stay as they are: {text}."
    return rule


def statistics(site: Site, axes: Axes, dims: list[int]) -> tuple[Expr, ...]:
    """The axes that the op takes statistics over; their elements need equally many copies."""
    for dim in dims:
        site.equal.append((axes[dim], f"{site.op} takes statistics over it"))
    return tuple(axes[dim] for dim in dims)


def _softmax(log: bool) -> Rule:
    def rule(site: Site) -> Value:
        """softmax, log_softmax: of m copies of each element the result is m times too small."""
        axes = site.axes(site.arg("self"))
        site.effects.append(Softmax(statistics(site, axes, _dims(site, axes)), log))
        return axes

    return rule


softmax = _softmax(log=False)
log_softmax = _softmax(log=True)


def logsumexp(site: Site) -> Value:
    """logsumexp: m copies add log m."""
    axes = site.axes(site.arg("self"))
    dims = _dims(site, axes)
    site.effects.append(Softmax(statistics(site, axes, dims), log=True, sign=-1))
    return _reduced(site, dims, axes)


def variance(site: Site) -> Value:
    """var, std, var_mean, std_mean."""
    axes = site.axes(site.arg("self"))
    dims = _dims(site, axes)
    if site.has_arg("correction"):
        correction: Any = 1 if site.arg("correction") is None else site.arg("correction")
    else:
        correction = int(site.arg("unbiased"))
    site.effects.append(Variance(statistics(site, axes, dims), correction))
    return site.results(_reduced(site, dims, axes))
