"""Rules of reductions over dimensions that an argument names."""

from __future__ import annotations

from typing import Any

from gpd_fx.axes import Expr, size
from gpd_fx.rules.effects import Linear, Softmax, Variance
from gpd_fx.rules.site import Axes, Rule, Site, Value, as_dims


def _reduced(site: Site, dims: list[int], axes: Axes) -> Axes:
    keep = site.has_arg("keepdim") and site.arg("keepdim")
    return [() if d in dims else axis for d, axis in enumerate(axes) if keep or d not in dims]


def _dims(site: Site, axes: Axes) -> list[int]:
    return as_dims(site.arg("dim") if site.has_arg("dim") else None, len(axes))


def _linear(site: Site, *, mean: bool = False, p: float = 1.0) -> Value:
    axes = site.axes(site.arg("self"))
    dims = _dims(site, axes)
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
    if not isinstance(p, int | float) or p <= 0:
        return site.freeze_all(f"a norm of order {p}")
    if p == float("inf"):
        return extreme(site)
    return _linear(site, p=float(p))


def extreme(site: Site) -> Value:
    """amax, amin, any, all: copies change nothing."""
    axes = site.axes(site.arg("self"))
    return _reduced(site, _dims(site, axes), axes)


def extreme_index(site: Site) -> Value:
    """max, min along a dimension: the index of a copy would mean nothing in the model."""
    axes = site.axes(site.arg("self"))
    dims = _dims(site, axes)
    for dim in dims:
        site.freeze(axes[dim], "indices into it are returned")
    kept = _reduced(site, dims, axes)
    return kept if len(site.schema.returns) == 1 else (kept, list(kept))


def _statistics(site: Site, axes: Axes, dims: list[int]) -> tuple[Expr, ...]:
    for dim in dims:
        site.equal.append((axes[dim], f"{site.op} takes statistics over it"))
    return tuple(axes[dim] for dim in dims)


def _softmax(log: bool) -> Rule:
    def rule(site: Site) -> Value:
        axes = site.axes(site.arg("self"))
        site.effects.append(Softmax(_statistics(site, axes, _dims(site, axes)), log))
        return axes

    return rule


softmax = _softmax(log=False)
log_softmax = _softmax(log=True)


def logsumexp(site: Site) -> Value:
    """logsumexp: m copies add log m."""
    axes = site.axes(site.arg("self"))
    dims = _dims(site, axes)
    site.effects.append(Softmax(_statistics(site, axes, dims), log=True, sign=-1))
    return _reduced(site, dims, axes)


def _variance(root: bool) -> Rule:
    def rule(site: Site) -> Value:
        axes = site.axes(site.arg("self"))
        dims = _dims(site, axes)
        if site.has_arg("correction"):
            correction: Any = 1 if site.arg("correction") is None else site.arg("correction")
        else:
            correction = 1 if site.arg("unbiased") else 0
        exprs = _statistics(site, axes, dims)
        if correction and any(size(e) != site.shape(site.arg("self"))[d] for d, e in zip(dims, exprs, strict=True)):
            return site.freeze_all("an unbiased variance over an axis of unknown size")
        site.effects.append(Variance(exprs, float(correction), root))
        return _reduced(site, dims, axes)

    return rule


variance = _variance(root=False)
deviation = _variance(root=True)


def scan(site: Site) -> Value:
    """cumsum and the like: the dimension is frozen."""
    axes = site.axes(site.arg("self"))
    dim = site.dim(site.arg("dim"), len(axes))
    site.freeze(axes[dim], "it is scanned in order")
    return axes
