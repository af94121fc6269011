"""Convolutions. Along space they are opaque, except where a kernel of size one only carries the axis through."""

from __future__ import annotations

from functools import cache
from typing import Any

from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.site import Rule, Site, Value

_PLAIN = "n (g i){x}, (g o) i{k}, (g o) -> n (g o){x} | (g i){x}, (g o) i{k}, (g o) -> (g o){x}"
_TRANSPOSED = "n (g i){x}, (g i) o{k}, (g o) -> n (g o){x} | (g i){x}, (g i) o{k}, (g o) -> (g o){x}"


def convolution(dims: int, *, transposed: bool = False) -> Rule:
    """conv, conv_transpose: groups, inputs and outputs of the weight; a dimension passes if the kernel is a point."""

    def rule(site: Site) -> Value:
        """conv, conv_transpose: groups and channels of the weight; a dimension passes if the kernel is a point."""
        return _rule(transposed, tuple(_passes(site, dim, dims) for dim in range(dims)))(site)

    return rule


@cache
def _rule(transposed: bool, passes: tuple[bool, ...]) -> Einsum:
    space = "".join(f" x{dim}" if free else " _" for dim, free in enumerate(passes))
    return Einsum((_TRANSPOSED if transposed else _PLAIN).format(x=space, k=" _" * len(passes)), groups="g")


def _passes(site: Site, dim: int, dims: int) -> bool:
    """Whether a spatial dimension goes through as it is: kernel and stride of one, no padding."""

    def at(name: str, default: Any) -> Any:
        value = site.arg(name) if site.has_arg(name) else default
        return value[dim if len(value) > 1 else 0] if isinstance(value, list | tuple) and value else value

    kernel = site.shape(site.arg("weight"))[dim - dims]
    padded = at("padding", 0) not in (0, "same", "valid") or at("output_padding", 0) != 0
    return kernel == 1 and at("stride", 1) == 1 and not padded
