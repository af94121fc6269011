"""Normalisation over the trailing dimensions."""

from __future__ import annotations

from string import ascii_lowercase

from gpd_fx.rules.effects import Extents
from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.site import Site, Value


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
